"""Links that send the blocks' bytes as payload of the frame: layer by layer, all K and then all V."""

from __future__ import annotations

import xxhash
from msgspec.structs import replace

from cache_messager.links.interface import HOST_FRAME_BYTES, UNCHECKED, LinkHost
from cache_messager.work import BlocksWritten, corrupt, violation
from kvrelay.errors import TransferError
from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.messages.messager_to_messager import KVFrame


class PayloadLink:
    """A ``KVLink`` without ``address``, which each kind defines."""

    max_frame_bytes = HOST_FRAME_BYTES

    def __init__(self, host: LinkHost) -> None:
        self._host = host

    def offer(self) -> bytes | None:
        """Return an empty offer: a receiver needs no data."""
        return b""

    def send(self, peer: PeerId, frame: KVFrame, source_block_ids: list[BlockId]) -> None:
        """Send views of the blocks, or copies if the views would be many and small."""
        parts = self._host.pool.read(frame.layers, source_block_ids)
        digest = _digest(parts) if self._host.checksum else UNCHECKED
        self._host.send(peer, replace(frame, digest=digest), parts)

    def accept(self, link_id: int, offer: bytes) -> None:
        """Do nothing."""

    def write(self, link_id: int, frame: KVFrame, payload: tuple[memoryview, ...]) -> None:
        """Verify the payload, then write it to the pool."""
        self._host.post(BlocksWritten(link_id, frame, self._write(frame, payload)))

    def _write(self, frame: KVFrame, payload: tuple[memoryview, ...]) -> TransferError | None:
        num_bytes = sum(part.nbytes for part in payload)
        if num_bytes != frame.num_bytes:
            return violation("the sender", f"{num_bytes} bytes of payload for {frame.num_bytes}")
        if frame.digest != UNCHECKED and _digest(payload) != frame.digest:
            return corrupt(frame)
        self._host.pool.write(frame.layers, frame.target_block_ids, payload)
        return None

    def drop(self, link_id: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _digest(parts: list[memoryview] | tuple[memoryview, ...]) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()
