"""P's cache messager <-> D's cache messager. All travel on the link that P's messager opened."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec

from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.messages.base import Message


class LinkOffer(msgspec.Struct, frozen=True, array_like=True):
    """A kind of link that a sender can use. ``handle`` is what a receiver needs for it, known to that kind alone."""

    kind: str
    handle: bytes


class LinkHello(Message, frozen=True, kw_only=True):
    """P's messager -> D's, first on each link. ``offers`` are the kinds of link it may be, the best first.

    The reader answers LinkAccepted or LinkRefused.
    """

    geometry: KVGeometry
    offers: list[LinkOffer]


class LinkAccepted(Message, frozen=True, kw_only=True):
    """D's messager -> P's. ``kind`` is the first offer that is possible at the sender of this message.

    The reader sends frames, with at most ``credit_bytes`` of KV not yet acknowledged.
    """

    kind: str
    credit_bytes: int


class LinkRefused(Message, frozen=True, kw_only=True):
    """D's messager -> P's: the two cannot exchange KV, or not any more. ``code``: that of a TransferError.

    The reader fails every transfer over this link.
    """

    reason: str
    code: str = "transfer_failed"


class KVFrame(Message, frozen=True, kw_only=True):
    """P's messager -> D's: some blocks, the same in ``num_layers`` layers from ``layer`` on.

    Payload follows if the kind of the link has the bytes travel so: layer by layer, all K and then all V. The reader
    verifies the digest (xxh3-64 of the payload, 0 if unchecked), writes each block once and answers FrameAck. Where the
    reader copies from the sender's pool, ``source_block_ids`` tell which blocks.
    """

    request_id: str
    epoch: int
    layer: int
    first_block: int
    target_block_ids: list[int]
    source_block_ids: list[int]
    num_bytes: int
    digest: int
    num_layers: int = 1

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
    """D's messager -> P's, answers KVFrame. ``status``: ``written``, ``stale`` (not expected now) or ``corrupt``.

    The reader takes the credit back; anything but ``written`` fails the transfer.
    """

    request_id: str
    epoch: int
    layer: int
    first_block: int
    num_bytes: int
    status: AckStatus


MessagerToMessager: TypeAlias = KVFrame | FrameAck | LinkHello | LinkAccepted | LinkRefused
