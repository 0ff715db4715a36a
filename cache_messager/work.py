"""What the messager's machine asks of its service beyond the core actions, and the events that answer."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.core.ids import BlockId, PeerId
from kvrelay.core.kv_handle import KVMemoryHandle
from kvrelay.core.messages.messager_to_messager import KVFrame

# ---------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Fill in the digest of ``frame`` and send it, followed by the blocks themselves if ``with_payload``.

    The blocks are read until the peer's FrameAck. If the frame cannot be queued at once, a PeerLost follows.
    """

    peer: PeerId
    frame: KVFrame
    source_block_ids: list[BlockId]
    with_payload: bool


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """Verify ``payload`` and copy it into the pool; without payload, copy from the pool mapped for ``link_id``.

    BlocksWritten follows.
    """

    link_id: int
    frame: KVFrame
    payload: tuple[memoryview, ...]


@dataclass(frozen=True, slots=True)
class MapPool:
    """Map a sender's pool, to copy from it; PoolMapped follows."""

    link_id: int
    handle: KVMemoryHandle


@dataclass(frozen=True, slots=True)
class UnmapPool:
    """Give back the pool mapped for ``link_id``. Nothing is copied from it any more."""

    link_id: int


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class BlocksWritten:
    """Answers WriteBlocks. Not ``ok``: the bytes are not those the sender read, and the blocks hold nothing of use."""

    link_id: int
    frame: KVFrame
    ok: bool


@dataclass(frozen=True, slots=True)
class PoolMapped:
    """Answers MapPool. Not ``ok``: the pool cannot be mapped here."""

    link_id: int
    ok: bool
