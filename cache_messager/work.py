"""Actions of the messager's machine beyond the core ones, and the events that answer them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kvrelay.errors import CorruptKVError, TransferError
from kvrelay.machine.outbox import RoleOutbox
from kvrelay.protocol.ids import BlockId, PeerId, peer_name
from kvrelay.protocol.messages.messager_to_messager import MAX_INFLIGHT_FRAMES, KVFrame, LinkOffer

# ---------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Send these blocks as ``frame`` over a link of ``kind``; answered by FrameSent.

    The blocks may be read until both FrameSent and the peer's FrameAck. If the frame cannot be queued at once, PeerLost
    also follows.
    """

    peer: PeerId
    kind: str
    frame: KVFrame
    source_block_ids: list[BlockId]


@dataclass(frozen=True, slots=True)
class OpenLink:
    """The peer has accepted a link of ``kind`` with ``handle``. Precedes the first SendFrame over the link."""

    peer: PeerId
    kind: str
    handle: bytes


@dataclass(frozen=True, slots=True)
class LeaveLink:
    """A link that was opened is lost: stop sending over it. FrameSent still answers every SendFrame."""

    peer: PeerId
    kind: str


@dataclass(frozen=True, slots=True)
class AcceptLink:
    """Accept the first of ``offers`` that is possible here; answered by LinkReady."""

    link_id: int
    offers: list[LinkOffer]


@dataclass(frozen=True, slots=True)
class DropLink:
    """Release the link's resources after its writes in progress. No more frames arrive on it."""

    link_id: int


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """Verify the blocks of ``frame`` and write them to the pool over its link; answered by BlocksWritten."""

    link_id: int
    frame: KVFrame
    payload: tuple[memoryview, ...]


Work: TypeAlias = SendFrame | OpenLink | LeaveLink | AcceptLink | DropLink | WriteBlocks
"""The messager-specific actions."""

MessagerOutbox: TypeAlias = RoleOutbox[Work]
"""The time of the event being handled, and the actions produced so far."""

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class FrameSent:
    """Answers SendFrame: the frame is queued for the peer, or ``error`` says why it could not be made."""

    frame: KVFrame
    error: TransferError | None = None


@dataclass(frozen=True, slots=True)
class LinkReady:
    """Answers AcceptLink. ``kind`` is None if none of the offers is possible here.

    ``reason``: why those before it, or all, are not possible.
    ``max_frames`` and ``handle``: what the sender must know of this end, as in LinkAccepted.
    """

    link_id: int
    kind: str | None
    reason: str = ""
    max_frames: int = MAX_INFLIGHT_FRAMES
    handle: bytes = b""


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The way by which a link moves bytes to ``peer`` has failed, even if messages still reach the peer."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class BlocksWritten:
    """Answers WriteBlocks. With an ``error``, the content of the blocks is invalid."""

    link_id: int
    frame: KVFrame
    error: TransferError | None = None


@dataclass(frozen=True, slots=True)
class DeviceLost:
    """The device has failed: its blocks cannot be accessed, and actions in progress get no answer."""

    reason: str


def corrupt(frame: KVFrame) -> CorruptKVError:
    """Return the error of a frame whose bytes differ from those the sender read."""
    return CorruptKVError(f"layer {frame.layer} from block {frame.first_block} arrived corrupt")


def violation(sender: str, problem: str) -> TransferError:
    """Return the error of a frame that ``sender`` should not have sent."""
    return TransferError(f"{peer_name(PeerId(sender))} broke the protocol: {problem}")
