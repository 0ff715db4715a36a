"""Shared memory within one host: D's messager maps P's pool and copies the blocks. Only the frame uses a ZMQ socket.

The digest is always verified, on the copy, because a sender that has dropped the link may change its blocks while they
are read, which nothing else detects.
"""

from __future__ import annotations

import msgspec

from cache_messager.links.interface import HOST_FRAME_BYTES, LinkHost
from cache_messager.work import BlocksWritten, corrupt, violation
from kvrelay.errors import TransferError
from kvrelay.kv_pool.attach import open_pool
from kvrelay.kv_pool.interface import KVPool, has_blocks
from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.kv_handle import KVMemoryHandle
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import MAX_INFLIGHT_FRAMES, KVFrame
from kvrelay.runtime.logging import log_event


class Link:
    """Copies from the sender's pool, which the receiver maps; for a peer on the same host."""

    max_frame_bytes = HOST_FRAME_BYTES
    max_frames = MAX_INFLIGHT_FRAMES

    def __init__(self, host: LinkHost) -> None:
        self._host = host
        self._sources: dict[int, KVPool] = {}

    @staticmethod
    def address(here: str, peer: LinkAddress) -> str | None:
        """Return the IPC address of a peer on this host."""
        return peer.ipc if peer.host_id == here else None

    def offer(self) -> bytes | None:
        """Return the handle of the pool if it is in host memory, else None."""
        handle = self._host.pool.handle
        if not isinstance(handle, KVMemoryHandle):
            log_event("info", "link not possible", {"kind": "shm", "reason": "this node's pool is not in host memory"})
            return None
        return msgspec.json.encode(handle)

    def open(self, peer: PeerId, handle: bytes) -> None:
        """Do nothing."""

    def leave(self, peer: PeerId) -> None:
        """Do nothing."""

    def send(self, peer: PeerId, frame: KVFrame, source_block_ids: list[BlockId]) -> None:
        """Send the block ids with the digest of the blocks."""
        digest = self._host.pool.digest(frame.layers, source_block_ids)
        self._host.send(peer, msgspec.structs.replace(frame, digest=digest, source_block_ids=source_block_ids))

    def accept(self, link_id: int, offer: bytes) -> bytes:
        """Open the sender's pool, which must be in host memory like this node's pool."""
        if not isinstance(self._host.pool.handle, KVMemoryHandle):
            raise TransferError("this node's pool is not in host memory")
        handle = msgspec.json.decode(offer, type=KVMemoryHandle)
        self._sources[link_id] = open_pool(self._host.pool.geometry, handle)
        return b""

    def write(self, link_id: int, frame: KVFrame, payload: tuple[memoryview, ...]) -> None:
        """Copy the blocks and verify the copy."""
        self._host.post(BlocksWritten(link_id, frame, self._write(self._sources[link_id], frame, payload)))

    def _write(self, source: KVPool, frame: KVFrame, payload: tuple[memoryview, ...]) -> TransferError | None:
        blocks = frame.source_block_ids
        if payload or len(blocks) != len(frame.target_block_ids):
            num_bytes = sum(part.nbytes for part in payload)
            return violation(
                "the sender", f"{len(blocks)} source blocks and {num_bytes} bytes of payload on a shm link"
            )
        if not has_blocks(source, blocks):
            return violation("the sender", "source blocks outside the pool")
        digest = self._host.pool.copy_from(source, frame.layers, frame.target_block_ids, blocks)
        return None if digest == frame.digest else corrupt(frame)

    def drop(self, link_id: int) -> None:
        """Close the sender's pool."""
        self._sources.pop(link_id).close()

    def close(self) -> None:
        """Close all pools."""
        while self._sources:
            self._sources.popitem()[1].close()
