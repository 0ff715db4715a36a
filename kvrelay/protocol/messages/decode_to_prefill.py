"""D -> P. (Besides these, Heartbeat.)"""

from __future__ import annotations

from kvrelay.protocol.messages.base import LinkAddress, Message


class BlocksReserved(Message, frozen=True, kw_only=True):
    """D -> P, answers ReserveBlocks: the messager at ``link`` takes frames for these blocks.

    The reader has the KV sent. ``block_ids[i]`` takes the request's block ``num_cached_blocks + i``: the blocks before
    those D has in its prefix cache. The blocks are P's for ``lease_s`` from here or from the last RenewReservations.
    """

    request_id: str
    epoch: int
    block_ids: list[int]
    num_cached_blocks: int
    link: LinkAddress
    lease_s: float


class ReservationRefused(Message, frozen=True, kw_only=True):
    """D -> P, answers ReserveBlocks: no room now (``retry_after_s``), or never (None).

    The reader asks the router for another decode node.
    """

    request_id: str
    epoch: int
    reason: str
    retry_after_s: float | None


class ReservationEnded(Message, frozen=True, kw_only=True):
    """D -> P: this reservation is no more (its lease ran out, its KV failed, D is stopping), or it never was.

    Not sent after an Abort: the router sends one to P too. The reader stops sending for it and, unless it has ended the
    request itself, reports RequestFailed with ``reason``.
    """

    request_id: str
    epoch: int
    reason: str
