"""Two messager processes on loopback, their nodes played by the test: real sockets, real shared memory, real deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, closing
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import uvloop
from messager_node import MessagerNode, messager_node, settings_of
from pools import make_pool, wrote
from support.ids import block_ids

from kvrelay.config.sections import TransferConfig
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId, RequestId
from kvrelay.protocol.messages.messager_to_node import (
    KVArrived,
    KVExpected,
    TransferClosed,
    TransferDone,
    TransferFailed,
)
from kvrelay.protocol.messages.node_to_messager import (
    CachedSignal,
    CloseTransfer,
    ExpectKV,
    KVSpan,
    LayerSignal,
    OpenTransfer,
    StopMessager,
)

GEOMETRY = KVGeometry(
    num_layers=4, num_kv_heads=2, head_dim=32, block_size=16, dtype="float32", model_digest="model", layout="NHD"
)
NUM_BLOCKS = 256


def run(
    scenario: Callable[..., Coroutine[None, None, None]],
    directory: Path,
    *,
    names: Sequence[str] = ("p0", "d0"),
    leftovers: int = 0,
    on_device: bool = False,
    **changes: object,
) -> None:
    """Play ``scenario`` with fresh messagers; they may leave only the sockets of those that were killed."""

    async def play() -> None:
        async with AsyncExitStack() as stack:
            nodes = []
            for name in names:
                pool = stack.enter_context(closing(make_pool(GEOMETRY, NUM_BLOCKS, on_device=on_device)))
                nodes.append(await stack.enter_async_context(messager_node(name, directory, pool, **changes)))
            await scenario(*nodes)

    uvloop.run(play())
    assert len(list(directory.glob("*messager*"))) == leftovers


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


async def transfer(
    p: MessagerNode,
    d: MessagerNode,
    sources: list[BlockId],
    targets: list[BlockId],
    *,
    request_id: str = "a",
) -> str:
    """Move blocks with the signals coming first; return the link they took."""
    rng = np.random.default_rng(7)
    p.pool.planes[:, :, sources] = rng.integers(0, 255, (4, 2, len(sources), GEOMETRY.plane_block_bytes), np.uint8)
    wrote(p.pool, sources)
    half = len(sources) // 2
    p.say(CachedSignal(span=KVSpan(RequestId(request_id), 1, 0, sources[:half])))
    p.say(LayerSignal(step=1, layer=0, spans=[KVSpan(RequestId(request_id), 1, half, sources[half:])]))
    d.say(ExpectKV(request_id=RequestId(request_id), epoch=1, first_block=0, target_block_ids=targets))
    await d.hears(KVExpected)
    p.say(OpenTransfer(request_id=RequestId(request_id), epoch=1, link=d.link, first_block=0, target_block_ids=targets))
    for layer in range(1, GEOMETRY.num_layers):
        p.say(LayerSignal(step=1, layer=layer, spans=[KVSpan(RequestId(request_id), 1, half, sources[half:])]))
    done, arrived = await p.hears(TransferDone), await d.hears(KVArrived)
    assert done.num_bytes == arrived.num_bytes == len(sources) * GEOMETRY.block_bytes
    assert np.array_equal(p.pool.planes[:, :, sources], d.pool.planes[:, :, targets])
    untouched = sorted(set(range(NUM_BLOCKS)) - set(targets))
    assert not d.pool.planes[:, :, untouched].any()
    return done.link


@pytest.mark.parametrize(
    ("setting", "link", "checksum"),
    [
        ("auto", "shm", True),
        ("auto", "cuda", True),
        ("cuda", "cuda", False),
        ("zmq", "ipc", True),
        ("zmq", "ipc", False),
        ("tcp", "tcp", True),
    ],
)
def test_blocks_move_between_processes(directory: Path, setting: str, link: str, checksum: bool) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        shuffled = np.random.default_rng(1).permutation(NUM_BLOCKS).tolist()
        assert await transfer(p, d, shuffled[:99], shuffled[50:149], request_id="scattered") == link
        d.pool.planes[:] = 0
        assert (
            await transfer(p, d, block_ids(*range(100)), block_ids(*range(100, 200)), request_id="in one piece") == link
        )

    links = TransferConfig.model_validate({"link": setting}).link_kinds
    run(scenario, directory, links=links, checksum=checksum, on_device=link == "cuda")


def test_payload_moves_between_pools_on_devices(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        assert await transfer(p, d, block_ids(*range(50, 0, -1)), block_ids(*range(70, 120))) == "tcp"

    run(scenario, directory, links=("tcp",), on_device=True)


@pytest.mark.fault("F13")
def test_killed_receiver_fails_the_transfer_and_the_blocks_come_back(directory: Path, on_device: bool) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        await transfer(p, d, block_ids(1, 2), block_ids(3, 4))
        d.process.kill()
        await d.process.wait()
        p.say(CachedSignal(span=KVSpan(RequestId("b"), 1, 0, block_ids(1, 2))))
        p.say(
            OpenTransfer(
                request_id=RequestId("b"), epoch=1, link=d.link, first_block=0, target_block_ids=block_ids(5, 6)
            )
        )
        failed = await p.hears(TransferFailed)
        assert failed.error.code == "peer_lost"

    run(scenario, directory, leftovers=1, peer_timeout_s=2.0, on_device=on_device)


@pytest.mark.fault("F09")
def test_stopped_receiver_holds_p_blocks_until_it_is_given_up(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        await transfer(p, d, block_ids(1, 2), block_ids(3, 4))
        os.kill(d.process.pid, signal.SIGSTOP)
        try:
            p.say(CachedSignal(span=KVSpan(RequestId("b"), 1, 0, block_ids(1, 2))))
            p.say(
                OpenTransfer(
                    request_id=RequestId("b"), epoch=1, link=d.link, first_block=0, target_block_ids=block_ids(5, 6)
                )
            )
            p.say(CloseTransfer(request_id=RequestId("b"), epoch=1))
            await p.hears(TransferClosed)
        finally:
            os.kill(d.process.pid, signal.SIGCONT)

    run(scenario, directory, timeout_s=3.0)


def test_node_that_lets_go_of_the_lifeline_ends_its_messager(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        assert p.process.stdin is not None
        p.process.stdin.close()
        assert await p.process.wait() == 0
        d.say(StopMessager())
        assert await d.process.wait() == 0

    run(scenario, directory)


@pytest.mark.fault("F13")
def test_node_dies_while_its_messager_starts(directory: Path) -> None:
    """Before it has written the settings, or before its pool is opened: no traceback, whose reader would seek a bug."""
    with closing(make_pool(GEOMETRY, NUM_BLOCKS, on_device=False)) as pool:
        settings = msgspec.json.encode(settings_of("p0", directory, pool))
    for written, status, said in [(settings[:100], 0, []), (settings + b"\n", 1, ["not started"])]:
        ended = subprocess.run(
            [sys.executable, "-m", "cache_messager"], input=written, capture_output=True, check=False
        )
        assert ended.returncode == status
        assert [json.loads(line)["event"] for line in ended.stderr.splitlines()] == said
    assert not list(directory.glob("*messager*"))


def test_signals_to_all_processes_leave_the_messager_to_its_node(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(p.process.pid, number)
        assert await transfer(p, d, block_ids(1, 2), block_ids(3, 4)) == "shm"

    run(scenario, directory)


def test_process_says_what_it_is_and_loads_no_engine(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        assert psutil.Process(p.process.pid).cmdline()[0] == "kvrelay messager p0"
        libraries = " ".join(mapping.path for mapping in psutil.Process(d.process.pid).memory_maps())
        assert "zmq" in libraries
        assert "paddle" not in libraries
        assert "pydantic" not in libraries

    run(scenario, directory)
