"""P's cache messager <-> D's cache messager, on the link that P's messager opened. Both also send Heartbeat."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec

from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId, RequestId
from kvrelay.protocol.messages.base import Message

MAX_INFLIGHT_FRAMES = 256
"""Maximum unacknowledged frames per link of any size: well below the send queue of a socket."""


class LinkOffer(msgspec.Struct, frozen=True, array_like=True):
    """A kind of link that the sender can use. ``handle`` is for the receiver; only that kind of link can read it."""

    kind: str
    handle: bytes


class LinkHello(Message, frozen=True, kw_only=True):
    """P's messager -> D's, the first message of each link. ``offers`` are in order of preference.

    The reader compares the geometry and answers LinkAccepted or LinkRefused.
    """

    geometry: KVGeometry
    offers: list[LinkOffer]


class LinkAccepted(Message, frozen=True, kw_only=True):
    """D's messager -> P's, answers LinkHello. ``kind`` is the first offer that D's messager can use.

    The reader may send frames, with at most ``credit_bytes`` of KV in at most ``max_frames`` frames that are not
    acknowledged. ``handle`` is for the reader's link of that kind. ``passed_over`` says why it is not an earlier offer.
    """

    kind: str
    credit_bytes: int
    max_frames: int = MAX_INFLIGHT_FRAMES
    handle: bytes = b""
    passed_over: str = ""


class LinkRefused(Message, frozen=True, kw_only=True):
    """D's messager -> P's: the geometries differ, no offer is possible, a frame came without an accepted link, or D is
    leaving. ``code`` is that of a TransferError.

    The reader drops the link and fails every transfer over it.
    """

    reason: str
    code: str = "transfer_failed"


class KVFrame(Message, frozen=True, kw_only=True):
    """P's messager -> D's: the same blocks in ``num_layers`` layers from ``layer`` on.

    The payload follows as raw message parts, layer by layer, all K and then all V, if the kind of link sends bytes
    (ipc, tcp). Else the reader copies ``source_block_ids`` from the sender's pool (shm, cuda), or the sender writes the
    payload to the reader's memory (nixl). The reader verifies the digest (xxh3-64 of the payload, 0 if unchecked; of
    pools on devices over cuda and nixl: of ``kv_pool.block_digest``), writes each block once and answers FrameAck. A
    repetition of a frame that is being written gets no answer of its own. ``slot``: a number below the link's
    ``max_frames`` that no other unacknowledged frame of the link has.
    """

    request_id: RequestId
    epoch: int
    layer: int
    first_block: int
    target_block_ids: list[BlockId]
    source_block_ids: list[BlockId]
    num_bytes: int
    digest: int
    num_layers: int = 1
    slot: int = 0

    @property
    def layers(self) -> range:
        """The layers whose blocks these are."""
        return range(self.layer, self.layer + self.num_layers)


class AckStatus(StrEnum):
    """What became of a frame: written, not expected now, or not as it was sent."""

    WRITTEN = "written"
    STALE = "stale"
    CORRUPT = "corrupt"


class FrameAck(Message, frozen=True, kw_only=True):
    """D's messager -> P's, answers KVFrame. ``status``: ``written``; ``stale``, the attempt is not expected; or
    ``corrupt``, the digest or the frame is wrong or the frame exceeds the credit.

    The reader may send ``num_bytes`` more. Any status but ``written`` fails the transfer.
    """

    request_id: RequestId
    epoch: int
    layer: int
    first_block: int
    num_bytes: int
    status: AckStatus


MessagerToMessager: TypeAlias = KVFrame | FrameAck | LinkHello | LinkAccepted | LinkRefused
