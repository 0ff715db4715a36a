"""What the messager's machine asks of its service beyond the core actions, and the events that answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kvrelay.errors import CorruptKVError, TransferError
from kvrelay.machine.outbox import RoleOutbox
from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.messages.messager_to_messager import KVFrame, LinkOffer

# ---------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Send these blocks as ``frame`` by a link of ``kind``; FrameSent follows.

    The blocks may be read until then, and until the peer's FrameAck. If the frame cannot be queued at once, a PeerLost
    follows too.
    """

    peer: PeerId
    kind: str
    frame: KVFrame
    source_block_ids: list[BlockId]


@dataclass(frozen=True, slots=True)
class AcceptLink:
    """Accept the first of ``offers`` that is possible here; LinkReady follows."""

    link_id: int
    offers: list[LinkOffer]


@dataclass(frozen=True, slots=True)
class DropLink:
    """Give back what the link holds, when the writes under way are over. Nothing more comes by it."""

    link_id: int


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """Verify the blocks of ``frame`` and put them into the pool, as this kind of link does; BlocksWritten follows."""

    link_id: int
    frame: KVFrame
    payload: tuple[memoryview, ...]


Work: TypeAlias = SendFrame | AcceptLink | DropLink | WriteBlocks
"""The actions that a messager adds to the core ones."""

MessagerOutbox: TypeAlias = RoleOutbox[Work]
"""The time of the event that the messager handles, and the actions it has led to."""

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class FrameSent:
    """Answers SendFrame: the frame is queued for the peer, or could not be made, with ``error``."""

    frame: KVFrame
    error: TransferError | None = None


@dataclass(frozen=True, slots=True)
class LinkReady:
    """Answers AcceptLink. ``kind`` is None if none of the offers is possible here, for the given ``reason``."""

    link_id: int
    kind: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BlocksWritten:
    """Answers WriteBlocks. With an ``error`` the blocks hold nothing of use."""

    link_id: int
    frame: KVFrame
    error: TransferError | None = None


def corrupt(frame: KVFrame) -> CorruptKVError:
    """Return the error of a frame whose bytes are not those that the sender read."""
    return CorruptKVError(f"layer {frame.layer} from block {frame.first_block} arrived corrupt")


def violation(sender: str, problem: str) -> TransferError:
    """Return the error of a frame that ``sender`` should not have sent."""
    return TransferError(f"{sender} broke the protocol: {problem}")
