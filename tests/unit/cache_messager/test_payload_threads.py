"""Payload to and from pools on devices: several frames are copied at once, and each gets one answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from pools import Pool, make_pool, wrote

from cache_messager.links.ipc import Link
from cache_messager.links.payload import NUM_THREADS, WORTH_A_THREAD_BYTES
from cache_messager.work import BlocksWritten, DeviceLost, FrameSent
from kvrelay.errors import CorruptKVError, DeviceError, TransferError
from kvrelay.kv_pool.interface import KVPool
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId, PeerId, RequestId
from kvrelay.protocol.messages.messager_to_messager import KVFrame

GEOMETRY = KVGeometry(NUM_THREADS, 8, 64, 16, "float32", "model")
BLOCKS = [BlockId(block) for block in (5, 2, 7)]


class Host:
    """A messager that takes frames and events from any thread."""

    checksum = True
    peer_timeout_s = 5.0
    is_only_kind = True

    def __init__(self, pool: Pool) -> None:
        self.pool: KVPool = pool
        self.answers: SimpleQueue[Any] = SimpleQueue()

    def send(self, peer: str, frame: KVFrame, payload: Sequence[memoryview] = ()) -> None:
        self.answers.put((frame, tuple(payload)))

    def post(self, event: object) -> None:
        self.answers.put(event)


def frame_of(layer: int) -> KVFrame:
    num_bytes = len(BLOCKS) * GEOMETRY.layer_block_bytes
    assert num_bytes >= WORTH_A_THREAD_BYTES
    return KVFrame(
        request_id=RequestId("a"),
        epoch=1,
        layer=layer,
        first_block=0,
        target_block_ids=BLOCKS,
        source_block_ids=[],
        num_bytes=num_bytes,
        digest=0,
    )


@pytest.fixture
def host() -> Iterator[Host]:
    with closing(make_pool(GEOMETRY, 8, on_device=True)) as pool:
        pool.planes[:] = np.random.default_rng(2).integers(0, 255, pool.planes.shape, np.uint8)
        wrote(pool)
        yield Host(pool)


def begin(host: Host, operation: str, layer: int, link: Link) -> None:
    """Have ``link`` send a frame of ``layer``, or write one of zeros."""
    frame = frame_of(layer)
    if operation == "read":
        link.send(PeerId("d0"), frame, BLOCKS)
    else:
        link.write(1, frame, (memoryview(bytes(frame.num_bytes)),))


@pytest.mark.parametrize("operation", ["read", "write"])
def test_several_frames_are_copied_at_once(host: Host, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy ends before all have begun, which would never be if they were made one after the other."""
    every = [range(layer, layer + 1) for layer in range(NUM_THREADS)]
    contents = [b"".join(host.pool.read(layers, BLOCKS)) for layers in every]
    blocks, all_begun = host.pool.blocks, threading.Barrier(NUM_THREADS)  # type: ignore[attr-defined]
    copy = getattr(blocks, operation)

    def copy_together(*arguments: Any) -> Any:
        all_begun.wait(60)
        return copy(*arguments)

    with closing(Link(host)) as link:
        monkeypatch.setattr(blocks, operation, copy_together)
        for layer in range(NUM_THREADS):
            begin(host, operation, layer, link)
        answers = [host.answers.get(timeout=60) for _ in every]
    if operation == "read":
        sent = {frame.layer: b"".join(payload) for frame, payload in answers}
        assert [sent[layer] for layer in range(NUM_THREADS)] == contents
    else:
        assert sorted(answer.frame.layer for answer in answers) == list(range(NUM_THREADS))
        assert [answer.error for answer in answers] == [None] * NUM_THREADS
        assert not any(any(host.pool.read(layers, BLOCKS)[0]) for layers in every)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_device_that_breaks_in_a_thread_is_lost(host: Host, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Link(host)) as link:
        break_blocks(host, operation, DeviceError("an illegal address"), monkeypatch)
        begin(host, operation, 0, link)
        assert host.answers.get(timeout=60) == DeviceLost("an illegal address")


@pytest.mark.parametrize(("operation", "answer"), [("read", FrameSent), ("write", BlocksWritten)])
def test_an_error_in_a_thread_is_the_answer_for_its_frame(
    host: Host, operation: str, answer: type[FrameSent | BlocksWritten], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Link(host)) as link:
        break_blocks(host, operation, MemoryError("no pinned memory"), monkeypatch)
        begin(host, operation, 0, link)
        event = host.answers.get(timeout=60)
    assert isinstance(event, answer)
    assert event.frame == frame_of(0)
    assert type(event.error) is TransferError
    assert event.error.message == "MemoryError: no pinned memory"


def break_blocks(host: Host, operation: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(host.pool.blocks, operation, broken)  # type: ignore[attr-defined]


def test_payload_that_is_corrupt_is_noticed_in_a_thread_too(host: Host) -> None:
    with closing(Link(host)) as link:
        link.send(PeerId("d0"), frame_of(0), BLOCKS)
        frame, (payload,) = host.answers.get(timeout=60)
        flipped = memoryview(bytes([payload[0] ^ 1]) + bytes(payload[1:]))
        link.write(1, frame, (flipped,))
        event = host.answers.get(timeout=60)
    assert isinstance(event.error, CorruptKVError)
