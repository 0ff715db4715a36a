"""Device-to-device copies within one host: D's messager opens P's pool and copies the blocks itself.

P's messager sends a frame with the digest of the blocks that P's engine computed after writing them. The copy kernel
digests the bytes it reads, and the two must be equal. A thread waits for the device to complete the copy. A device
failure ends the messager instead of failing frames as corrupt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import msgspec

from cache_messager.links.interface import LinkHost
from cache_messager.work import BlocksWritten, DeviceLost, corrupt, violation
from kvrelay.errors import DeviceError, TransferError
from kvrelay.kv_pool.attach import open_pool
from kvrelay.kv_pool.device_memory import BlockCopy, DeviceMemory
from kvrelay.kv_pool.interface import has_blocks
from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.kv_handle import KVDeviceHandle
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import MAX_INFLIGHT_FRAMES, KVFrame
from kvrelay.runtime.logging import log_event


class Link:
    """Copies from the sender's pool on a device to this one's, for a peer on the same host.

    A frame costs the host the same whatever its size, and the device copies its largest in less time than that.
    """

    max_frame_bytes = 64 << 20
    max_frames = MAX_INFLIGHT_FRAMES

    def __init__(self, host: LinkHost) -> None:
        self._host = host
        self._sources: dict[int, DeviceMemory] = {}
        self._in_order = _InOrder()

    @staticmethod
    def address(here: str, peer: LinkAddress) -> str | None:
        """Return the IPC address of a peer on this host."""
        return peer.ipc if peer.host_id == here else None

    def offer(self) -> bytes | None:
        """Return the handle of the pool if it is on a device, else None."""
        handle = self._host.pool.handle
        if not isinstance(handle, KVDeviceHandle):
            log_event("info", "link not possible", {"kind": "cuda", "reason": "this node's pool is not on a device"})
            return None
        return msgspec.json.encode(handle)

    def open(self, peer: PeerId, handle: bytes) -> None:
        """Do nothing."""

    def leave(self, peer: PeerId) -> None:
        """Do nothing."""

    def send(self, peer: PeerId, frame: KVFrame, source_block_ids: list[BlockId]) -> None:
        """Send the block ids with the digest computed when the blocks were written."""
        digest = self._host.pool.digest(frame.layers, source_block_ids)
        self._host.send(peer, msgspec.structs.replace(frame, digest=digest, source_block_ids=source_block_ids))

    def accept(self, link_id: int, offer: bytes) -> bytes:
        """Open the sender's pool. Raises TransferError unless it is on a device of the same kind as this node's."""
        own, handle = self._host.pool.handle, msgspec.json.decode(offer, type=KVDeviceHandle)
        if not isinstance(own, KVDeviceHandle) or own.kind != handle.kind:
            raise TransferError(f"this node's pool is not on a device of the kind {handle.kind}")
        source = open_pool(self._host.pool.geometry, msgspec.structs.replace(handle, framework=own.framework))
        assert isinstance(source, DeviceMemory)  # because of its handle
        self._sources[link_id] = source
        return b""

    def write(self, link_id: int, frame: KVFrame, payload: tuple[memoryview, ...]) -> None:
        """Start a device copy that also digests the bytes it reads."""
        source, pool, blocks = self._sources[link_id], self._host.pool, frame.source_block_ids
        assert isinstance(pool, DeviceMemory)  # else the link was not accepted
        problem = _problem_with(source, frame, payload)
        if problem is not None:
            self._host.post(BlocksWritten(link_id, frame, violation("the sender", problem)))
            return
        copy = pool.begin_copy(source, frame.layers, frame.target_block_ids, blocks)
        self._in_order.do(lambda: self._finish(link_id, frame, copy), wait=not copy.is_done)

    def _finish(self, link_id: int, frame: KVFrame, copy: BlockCopy) -> None:
        """Wait for ``copy`` and post its result. Called from any thread."""
        try:
            error = None if copy.wait() == frame.digest else corrupt(frame)
        except DeviceError as broken:
            self._host.post(DeviceLost(broken.message))
            return
        self._host.post(BlocksWritten(link_id, frame, error))

    def drop(self, link_id: int) -> None:
        """Close the sender's pool after the copies from it."""
        self._in_order.do(self._sources.pop(link_id).close)

    def close(self) -> None:
        """Close all pools."""
        self._in_order.end()
        while self._sources:
            self._sources.popitem()[1].close()


def _problem_with(source: DeviceMemory, frame: KVFrame, payload: tuple[memoryview, ...]) -> str | None:
    """Return why ``frame`` is invalid for this kind of link, or None."""
    blocks = frame.source_block_ids
    if payload or len(blocks) != len(frame.target_block_ids):
        num_bytes = sum(part.nbytes for part in payload)
        return f"{len(blocks)} source blocks and {num_bytes} bytes of payload on a cuda link"
    return None if has_blocks(source, blocks) else "source blocks outside the pool"


class _InOrder:
    """Runs calls in order: in the caller until the first one that waits, then in a thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[[], None], *, wait: bool = False) -> None:
        """Run ``work``. From the first call with ``wait`` on, all work runs in the thread."""
        if self._thread is None and not wait:
            work()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cuda link", daemon=True)
            self._thread.start()
        self._queue.put(work)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()

    def end(self) -> None:
        """Wait until all work is done, and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
