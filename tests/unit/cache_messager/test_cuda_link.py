"""What is the cuda link's own: copies that the device finishes later, and a device that breaks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from messager_pair import D_NODE, GEOMETRY, NUM_BLOCKS, P_NODE, D, P, Pair, one_of_each
from pools import SimulatedMemory, make_pool, wrote
from support.ids import block_ids

from cache_messager.links.cuda import Link
from cache_messager.work import BlocksWritten, DeviceLost
from kvrelay.errors import DeviceError
from kvrelay.kv_pool.block_digest import Words
from kvrelay.protocol.ids import Attempt, BlockId, PeerId, RequestId
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import KVFrame
from kvrelay.protocol.messages.messager_to_node import TransferFailed

A = Attempt(RequestId("a"), 1)


class _Late:
    """Work of a device that is done when ``finish`` is called, or breaks with ``error``."""

    def __init__(self, digests: Words) -> None:
        self.error: DeviceError | None = None
        self._digests = digests
        self._over = threading.Event()

    @property
    def is_done(self) -> bool:
        return self._over.is_set()

    def finish(self, error: DeviceError | None = None) -> None:
        self.error = error
        self._over.set()

    def wait(self) -> Words:
        self._over.wait()
        if self.error is not None:
            raise self.error
        return self._digests


class Host:
    """A messager whose events come from any thread."""

    checksum = True
    peer_timeout_s = 5.0
    is_only_kind = True

    def __init__(self, pool: SimulatedMemory) -> None:
        self.pool: Any = pool
        self.events: SimpleQueue[object] = SimpleQueue()
        self.frame: KVFrame

    def send(self, peer: str, frame: KVFrame, payload: Sequence[memoryview] = ()) -> None:
        self.frame = frame

    def post(self, event: object) -> None:
        self.events.put(event)


class Receiver:
    """D's end of a link, with frames to write and copies that end when the test says so."""

    def __init__(self, source: SimulatedMemory, target: SimulatedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = Host(target)
        self.link = Link(self.host)
        self._sender = Host(source)
        offer = Link(self._sender).offer()
        assert offer is not None
        self.link.accept(1, offer)
        self.works: list[_Late] = []
        begin_copy = target.blocks.begin_copy

        def begin_late(*arguments: Any) -> _Late:
            self.works.append(_Late(begin_copy(*arguments).wait()))
            return self.works[-1]

        monkeypatch.setattr(target.blocks, "begin_copy", begin_late)

    def write(self, layer: int) -> KVFrame:
        """Begin to write a frame of two blocks of ``layer``."""
        num_bytes = 2 * GEOMETRY.layer_block_bytes
        frame = KVFrame(
            request_id=RequestId("a"),
            epoch=1,
            layer=layer,
            first_block=0,
            target_block_ids=block_ids(7, 3),
            source_block_ids=[],
            num_bytes=num_bytes,
            digest=0,
        )
        Link(self._sender).send(D, frame, block_ids(1, 2))
        self.link.write(1, self._sender.frame, ())
        return self._sender.frame


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    source, target = (make_pool(GEOMETRY, NUM_BLOCKS, on_device=True) for _ in range(2))
    assert isinstance(source, SimulatedMemory)
    assert isinstance(target, SimulatedMemory)
    source.planes[:] = np.random.default_rng(2).integers(0, 255, source.planes.shape, np.uint8)
    wrote(source)
    with closing(source), closing(target):
        receiver = Receiver(source, target, monkeypatch)
        yield receiver
        for work in receiver.works:
            work.finish()
        receiver.link.close()


def test_frames_are_answered_in_order_when_the_device_has_done_them(receiver: Receiver) -> None:
    frames = [receiver.write(layer) for layer in range(3)]
    assert len(receiver.works) == 3, "the second copy begins before the first has ended"
    assert receiver.host.events.empty()
    for work in reversed(receiver.works):
        work.finish()
    answers = [receiver.host.events.get(timeout=60) for _ in frames]
    assert answers == [BlocksWritten(1, frame) for frame in frames]


def test_a_dropped_link_keeps_the_pool_until_its_copies_have_ended(receiver: Receiver) -> None:
    source = receiver.link._sources[1]
    closed = threading.Event()
    close = source.close

    def spy() -> None:
        assert not receiver.host.events.empty(), "closed under a copy"
        close()
        closed.set()

    source.close = spy  # type: ignore[method-assign]
    receiver.write(0)
    receiver.link.drop(1)
    assert not closed.is_set()
    receiver.works[0].finish()
    assert closed.wait(60)
    receiver.link.close()
    assert receiver.host.events.get(timeout=60) == BlocksWritten(1, receiver._sender.frame)


def test_a_device_that_breaks_is_no_corruption(receiver: Receiver) -> None:
    receiver.write(0)
    receiver.works[0].finish(DeviceError("an illegal address"))
    assert receiver.host.events.get(timeout=60) == DeviceLost("an illegal address")


def started_on_device(monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, list[BlockId]]:
    monkeypatch.setattr(Pair, "on_device", True)
    pair = Pair()
    sources, targets = one_of_each(pair, A)
    pair.open(A, targets)
    pair.run()
    return pair, sources


@pytest.mark.parametrize("fails", ["begin", "end"])
def test_messager_ends_with_its_device_and_tells_its_senders(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    pair, sources = started_on_device(monkeypatch)
    work = _Late(np.zeros(0, np.int64))
    work.finish(DeviceError("an illegal address"))

    def broken(*_: Any) -> _Late:
        if fails == "begin":
            raise DeviceError("an illegal address")
        return work

    with pair:
        pool: Any = pair.ends[D].pool
        monkeypatch.setattr(pool.blocks, "begin_copy", broken)
        pair.signal_all(A, sources)
        pair.run()
        assert pair.ends[D].exit_reason == "the device is lost: an illegal address"
        (failed,) = pair.told(P, TransferFailed)
        assert isinstance(failed, TransferFailed)
        assert failed.error.code == "transfer_failed"
        assert pair.endings(D, A) == [], "its node hears of it by the end of the process"
        assert not pair.num_accepted(D)


@pytest.mark.parametrize("me", [P, D])
def test_payload_of_a_broken_device_ends_the_messager_too(monkeypatch: pytest.MonkeyPatch, me: PeerId) -> None:
    monkeypatch.setattr(Pair, "on_device", True)

    def broken(*_: Any) -> Words:
        raise DeviceError("an illegal address")

    with Pair(links=("ipc",)) as pair:
        sources, targets = one_of_each(pair, A)
        pool: Any = pair.ends[me].pool
        monkeypatch.setattr(pool.blocks, "read" if me == P else "write", broken)
        pair.open(A, targets)
        pair.signal_all(A, sources)
        pair.run()
        assert pair.ends[me].exit_reason == "the device is lost: an illegal address"


def test_damaged_source_fails_its_transfer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, sources = started_on_device(monkeypatch)
    other = Attempt(RequestId("b"), 1)
    with pair:
        others = [block for block in block_ids(*range(40, 60)) if block not in sources][:4]
        pair.sources[other] = others
        pair.expect(other, block_ids(60, 61, 62, 63))
        pair.run([(D_NODE, D)])
        link = LinkAddress(peer=D, host_id="host", tcp=f"tcp://{D}", ipc=f"ipc://{D}")
        assert link.host_id == pair.ends[D].machine._link.host_id
        pair.open(other, block_ids(60, 61, 62, 63))
        pair.ends[P].pool.planes[1, 0, sources[2], 5] ^= 1  # after it was computed, before it is signalled
        pair.signal_all(A, sources)
        pair.signal_all(other, others)
        pair.run([(P_NODE, P)])
        pair.run()
        (failed,) = pair.told(P, TransferFailed)
        assert isinstance(failed, TransferFailed)
        assert (failed.request_id, failed.error.code) == ("a", "corrupt_kv")
        pair.assert_moved(other)
