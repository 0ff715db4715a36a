"""Messager processes with a nixl link and the real library, over host memory: what moves, and what faults do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from messager_node import MessagerNode
from support.ids import block_ids
from test_messager_processes import NUM_BLOCKS, run, transfer

from cache_messager.links.nixl.agent import reason_against
from cache_messager.links.nixl.staging import NUM_SLOTS
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.messages.messager_to_node import (
    KVArrived,
    KVCancelled,
    KVExpected,
    KVFailed,
    TransferClosed,
    TransferDone,
    TransferFailed,
)
from kvrelay.protocol.messages.node_to_messager import (
    CachedSignal,
    CancelKV,
    CloseTransfer,
    ExpectKV,
    KVSpan,
    LayerSignal,
    OpenTransfer,
)

pytestmark = pytest.mark.skipif(reason_against() is not None, reason=str(reason_against()))


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def test_blocks_move_by_nixl(directory: Path, on_device: bool) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        shuffled = block_ids(*np.random.default_rng(1).permutation(NUM_BLOCKS).tolist())
        assert await transfer(p, d, shuffled[:99], shuffled[50:149], request_id="scattered") == "nixl"
        d.pool.planes[:] = 0
        in_one_piece = block_ids(*range(100)), block_ids(*range(100, 200))
        assert await transfer(p, d, *in_one_piece, request_id="in one piece") == "nixl"

    run(scenario, directory, links=("nixl",), on_device=on_device)


async def move_to_both(p: MessagerNode, lost: MessagerNode, other: MessagerNode) -> None:
    """Begin a transfer to each; the one to ``lost`` fails, the other arrives."""
    for name, d in ((RequestId("b"), lost), (RequestId("c"), other)):
        if d is other:
            d.say(ExpectKV(request_id=name, epoch=1, first_block=0, target_block_ids=block_ids(5, 6)))
            await d.hears(KVExpected)
        p.say(CachedSignal(span=KVSpan(name, 1, 0, block_ids(1, 2))))
        p.say(OpenTransfer(request_id=name, epoch=1, link=d.link, first_block=0, target_block_ids=block_ids(5, 6)))
    endings: dict[str, TransferDone | TransferFailed] = {}
    while len(endings) < 2:
        ending = await p.hears(Message)
        if isinstance(ending, TransferDone | TransferFailed):
            endings[ending.request_id] = ending
    failed, done = endings["b"], endings["c"]
    assert isinstance(failed, TransferFailed)
    assert failed.error.code == "peer_lost"
    assert isinstance(done, TransferDone)
    assert done.link == "nixl"
    assert np.array_equal(p.pool.planes[:, :, [1, 2]], other.pool.planes[:, :, [5, 6]])


def test_a_killed_receiver_fails_its_transfer_and_no_other(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode, other: MessagerNode) -> None:
        assert await transfer(p, d, block_ids(1, 2), block_ids(3, 4)) == "nixl"
        d.process.kill()
        await d.process.wait()
        await move_to_both(p, d, other)

    run(scenario, directory, names=("p0", "d0", "d1"), leftovers=1, links=("nixl",), peer_timeout_s=2.0)


def test_a_frozen_receiver_fails_its_transfer_and_no_other(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode, other: MessagerNode) -> None:
        assert await transfer(p, d, block_ids(1, 2), block_ids(3, 4)) == "nixl"
        os.kill(d.process.pid, signal.SIGSTOP)
        try:
            await move_to_both(p, d, other)
            p.say(CloseTransfer(request_id=RequestId("b"), epoch=1))
            await p.hears(TransferClosed)
        finally:
            os.kill(d.process.pid, signal.SIGCONT)
        d.pool.planes[:] = 0
        assert await transfer(p, d, block_ids(11, 12), block_ids(13, 14), request_id="d") == "nixl"

    run(scenario, directory, names=("p0", "d0", "d1"), links=("nixl",), peer_timeout_s=2.5)


def test_a_killed_sender_fails_the_expectation_and_the_receiver_serves_others(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode, other: MessagerNode) -> None:
        for name, targets in ((RequestId("b"), block_ids(5, 6)), (RequestId("a"), block_ids(3, 4))):
            d.say(ExpectKV(request_id=name, epoch=1, first_block=0, target_block_ids=targets))
            await d.hears(KVExpected)
            p.say(OpenTransfer(request_id=name, epoch=1, link=d.link, first_block=0, target_block_ids=targets))
        p.say(LayerSignal(step=1, layer=0, spans=[KVSpan(RequestId("b"), 1, 0, block_ids(1, 2))]))
        p.say(CachedSignal(span=KVSpan(RequestId("a"), 1, 0, block_ids(1, 2))))
        await d.hears(KVArrived)
        p.process.kill()
        await p.process.wait()
        assert (await d.hears(KVFailed)).error.code == "peer_lost"
        d.pool.planes[:] = 0
        assert await transfer(other, d, block_ids(7, 8), block_ids(5, 6), request_id="c") == "nixl"

    run(scenario, directory, names=("p0", "d0", "p1"), leftovers=1, links=("nixl",), peer_timeout_s=2.0)


def test_frames_of_an_epoch_that_is_over_leave_the_blocks_alone(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        targets = block_ids(3, 4)
        d.say(ExpectKV(request_id=RequestId("a"), epoch=1, first_block=0, target_block_ids=targets))
        await d.hears(KVExpected)
        p.say(OpenTransfer(request_id=RequestId("a"), epoch=1, link=d.link, first_block=0, target_block_ids=targets))
        d.say(CancelKV(request_id=RequestId("a"), epoch=1))
        await d.hears(KVCancelled)
        p.pool.planes[:, :, [1, 2]] = 77
        p.say(CachedSignal(span=KVSpan(RequestId("a"), 1, 0, block_ids(1, 2))))
        assert (await p.hears(TransferFailed)).error.code == "transfer_failed"
        assert not d.pool.planes.any()
        # The slots of the refused frames are free again, and the link is still open.
        for number in range(2 * NUM_SLOTS):
            d.pool.planes[:] = 0
            assert await transfer(p, d, block_ids(1, 2), block_ids(3, 4), request_id=f"next {number}") == "nixl"

    run(scenario, directory, links=("nixl",))


def test_a_closed_transfer_gives_its_blocks_back_and_the_link_goes_on(directory: Path) -> None:
    async def scenario(p: MessagerNode, d: MessagerNode) -> None:
        many = block_ids(*range(100))
        d.say(ExpectKV(request_id=RequestId("a"), epoch=1, first_block=0, target_block_ids=many))
        await d.hears(KVExpected)
        p.say(CachedSignal(span=KVSpan(RequestId("a"), 1, 0, many)))
        p.say(OpenTransfer(request_id=RequestId("a"), epoch=1, link=d.link, first_block=0, target_block_ids=many))
        p.say(CloseTransfer(request_id=RequestId("a"), epoch=1))
        await p.hears(TransferClosed)
        d.say(CancelKV(request_id=RequestId("a"), epoch=1))
        await d.hears(KVCancelled)
        d.pool.planes[:] = 0
        assert await transfer(p, d, block_ids(1, 2), block_ids(3, 4), request_id="b") == "nixl"

    run(scenario, directory, links=("nixl",))
