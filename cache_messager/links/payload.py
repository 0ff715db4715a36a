"""Links that send the blocks' bytes as payload of the frame: layer by layer, all K and then all V.

A pool on a device takes its time to copy blocks to and from the host, so its frames are copied and digested in threads:
several are under way at once. Frames of a pool in host memory are not: their copies and digests cost the host as much
in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import xxhash
from msgspec.structs import replace

from cache_messager.links.interface import HOST_FRAME_BYTES, UNCHECKED, LinkHost
from cache_messager.work import BlocksWritten, DeviceLost, FrameSent, corrupt, violation
from kvrelay.errors import DeviceError, TransferError
from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.kv_handle import KVDeviceHandle
from kvrelay.protocol.messages.messager_to_messager import MAX_INFLIGHT_FRAMES, KVFrame

NUM_THREADS = 4

WORTH_A_THREAD_BYTES = 64 << 10
"""Smaller frames are copied at once: to hand one over takes as long."""

logger = logging.getLogger(__name__)


class PayloadLink:
    """A ``KVLink`` without ``address``, which each kind defines."""

    max_frame_bytes = HOST_FRAME_BYTES
    max_frames = MAX_INFLIGHT_FRAMES

    def __init__(self, host: LinkHost) -> None:
        self._host = host
        self._is_on_device = isinstance(host.pool.handle, KVDeviceHandle)
        self._threads: ThreadPoolExecutor | None = None

    def offer(self) -> bytes | None:
        """Return an empty offer: a receiver needs no data."""
        return b""

    def open(self, peer: PeerId, handle: bytes) -> None:
        """Do nothing."""

    def leave(self, peer: PeerId) -> None:
        """Do nothing."""

    def send(self, peer: PeerId, frame: KVFrame, source_block_ids: list[BlockId]) -> None:
        """Send views of the blocks, or copies if they are on a device or the views would be many and small."""

        def send() -> None:
            parts = self._host.pool.read(frame.layers, source_block_ids)
            digest = _digest(parts) if self._host.checksum else UNCHECKED
            self._host.send(peer, replace(frame, digest=digest), parts)

        self._do(frame, send, lambda error: FrameSent(frame, error))

    def accept(self, link_id: int, offer: bytes) -> bytes:
        """Return an empty handle: a sender needs no data."""
        return b""

    def write(self, link_id: int, frame: KVFrame, payload: tuple[memoryview, ...]) -> None:
        """Verify the payload, then write it to the pool."""

        def write() -> None:
            self._host.post(BlocksWritten(link_id, frame, self._write(frame, payload)))

        self._do(frame, write, lambda error: BlocksWritten(link_id, frame, error))

    def _write(self, frame: KVFrame, payload: tuple[memoryview, ...]) -> TransferError | None:
        num_bytes = sum(part.nbytes for part in payload)
        if num_bytes != frame.num_bytes:
            return violation("the sender", f"{num_bytes} bytes of payload for {frame.num_bytes}")
        if frame.digest != UNCHECKED and _digest(payload) != frame.digest:
            return corrupt(frame)
        self._host.pool.write(frame.layers, frame.target_block_ids, payload)
        return None

    def _do(self, frame: KVFrame, work: Callable[[], None], failed: Callable[[TransferError], object]) -> None:
        """Do ``work``, which posts its answer, here or in a thread. There ``failed`` makes the answer if it raises."""
        if not self._is_on_device or frame.num_bytes < WORTH_A_THREAD_BYTES:
            work()
            return

        def guarded() -> None:
            try:
                work()
            except DeviceError as error:
                self._host.post(DeviceLost(error.message))
            except Exception as error:  # the border of the thread: without an answer the blocks are held for ever
                logger.exception("a frame was not copied")
                self._host.post(failed(TransferError(f"{type(error).__name__}: {error}")))

        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_THREADS, "payload")
        self._threads.submit(guarded)

    def drop(self, link_id: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()


def _digest(parts: list[memoryview] | tuple[memoryview, ...]) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()
