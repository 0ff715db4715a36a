"""A kind of link of somebody else's, which copies in a thread of its own, works without another change."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvloop
from messager_node import MessagerNode
from support.ids import block_ids

from cache_messager.links import shm
from cache_messager.links.interface import LinkHost
from cache_messager.service import serve
from cache_messager.settings import MessagerSettings
from cache_messager.work import FrameSent
from kvrelay.errors import TransferError
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId, PeerId, RequestId
from kvrelay.protocol.messages.messager_to_messager import KVFrame
from kvrelay.protocol.messages.messager_to_node import (
    KVArrived,
    KVExpected,
    MessagerReady,
    TransferDone,
    TransferFailed,
)
from kvrelay.protocol.messages.node_to_messager import CachedSignal, ExpectKV, KVSpan, OpenTransfer, StopMessager

GEOMETRY = KVGeometry(num_layers=4, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32", model_digest="model")
NUM_BLOCKS = 64


class ThreadLink(shm.Link):
    """As shm, with digests and copies in a thread; ``fails`` while it is to answer with an error."""

    fails = False

    def __init__(self, host: LinkHost) -> None:
        super().__init__(host)
        self._thread = ThreadPoolExecutor(1)

    def send(self, peer: str, frame: KVFrame, source_block_ids: list[BlockId]) -> None:
        if self.fails:
            self._thread.submit(self._host.post, FrameSent(frame, TransferError("the device is gone")))
        else:
            self._thread.submit(super().send, PeerId(peer), frame, source_block_ids)

    def write(self, link_id: int, frame: KVFrame, payload: tuple[memoryview, ...]) -> None:
        self._thread.submit(super().write, link_id, frame, payload)

    def drop(self, link_id: int) -> None:
        self._thread.submit(super().drop, link_id)

    def close(self) -> None:
        self._thread.shutdown()
        super().close()


@pytest.fixture(autouse=True)
def thread_link(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "cache_messager.links.threads", SimpleNamespace(Link=ThreadLink))
    yield
    ThreadLink.fails = False


async def _transfer(p: MessagerNode, d: MessagerNode, sources: list[BlockId], targets: list[BlockId]) -> str:
    p.say(CachedSignal(span=KVSpan(RequestId("a"), 1, 0, sources)))
    d.say(ExpectKV(request_id=RequestId("a"), epoch=1, first_block=0, target_block_ids=targets))
    await d.hears(KVExpected)
    p.say(OpenTransfer(request_id=RequestId("a"), epoch=1, link=d.link, first_block=0, target_block_ids=targets))
    if ThreadLink.fails:
        return (await p.hears(TransferFailed)).error.message
    await d.hears(KVArrived)
    return (await p.hears(TransferDone)).link


async def two_nodes(
    directory: Path, sources: list[BlockId], targets: list[BlockId], links: tuple[str, ...] = ("threads", "ipc")
) -> str:
    """Run two messagers in this process; return how the transfer went."""
    async with AsyncExitStack() as stack:
        nodes, tasks, writers = [], [], []
        for seed, name in enumerate(("p0", "d0")):
            pool = stack.enter_context(closing(KVMemory.create(GEOMETRY, NUM_BLOCKS)))
            if name == "p0":
                pool.planes[:] = np.random.default_rng(seed).integers(0, 255, pool.planes.shape, np.uint8)
            node = MessagerNode(name, directory, pool)
            stack.callback(node.transport.close)
            settings = MessagerSettings(
                me=PeerId(f"{name}.messager#1"),
                node=PeerId(node.me),
                node_address=node.address,
                geometry=GEOMETRY,
                pool=pool.handle,
                host="127.0.0.1",
                runtime_dir=str(directory),
                links=links,
            )
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            writers.append(writer)
            tasks.append(asyncio.create_task(serve(settings, reader)))
            node.link = (await node.hears(MessagerReady)).link
            nodes.append(node)
        p, d = nodes
        outcome = await _transfer(p, d, sources, targets)
        for node in nodes:
            node.say(StopMessager())
        await asyncio.gather(*tasks)
        for writer in writers:
            os.close(writer)
        if not ThreadLink.fails:
            assert np.array_equal(d.pool.planes[:, :, targets], p.pool.planes[:, :, sources])
        return outcome


def test_blocks_move_by_a_link_with_a_thread_of_its_own(tmp_path: Path) -> None:
    blocks = np.random.default_rng(7).permutation(NUM_BLOCKS).tolist()
    assert uvloop.run(two_nodes(tmp_path, blocks[:40], blocks[20:60])) == "threads"


def test_error_in_the_thread_of_a_link_fails_the_transfer(tmp_path: Path) -> None:
    ThreadLink.fails = True
    assert uvloop.run(two_nodes(tmp_path, block_ids(1, 2), block_ids(3, 4))) == "the device is gone"
