"""D -> P. D also sends P Heartbeat."""

from __future__ import annotations

from kvrelay.protocol.ids import BlockId, RequestId
from kvrelay.protocol.messages.base import LinkAddress, Message
from kvrelay.protocol.quantities import Duration


class BlocksReserved(Message, frozen=True, kw_only=True):
    """D -> P, answers ReserveBlocks: the blocks are reserved, and the messager at ``link`` accepts frames for them.

    The reader opens the transfer, and hands the request off as soon as it has the first output token. If it does not
    need the reservation any more it answers CancelReservation. ``block_ids[i]`` is for the request's block
    ``num_cached_blocks + i``; D has the blocks before that in its prefix cache. The reservation expires ``lease_s``
    after it was made or last named in RenewReservations, unless the KV and the hand-off have arrived by then.
    """

    request_id: RequestId
    epoch: int
    block_ids: list[BlockId]
    num_cached_blocks: int
    link: LinkAddress
    lease_s: Duration


class ReservationRefused(Message, frozen=True, kw_only=True):
    """D -> P, answers ReserveBlocks: nothing is reserved.

    ``retry_after_s`` set: D has no room now. The reader sends the router DecodeNeeded. None: D can never hold the
    request. The reader fails it with RequestFailed, not retryable.
    """

    request_id: RequestId
    epoch: int
    reason: str
    retry_after_s: Duration | None


class ReservationEnded(Message, frozen=True, kw_only=True):
    """D -> P: the reservation has ended: its lease expired, its transfer failed, its hand-off was invalid, or D is
    stopping. Also the answer to a HandOff or RenewReservations that names a reservation which D does not have.

    Not sent after an Abort, a CancelReservation, or the loss of the request's router. The reader stops the transfer and
    sends RequestFailed with ``reason``. It ignores the message if it has already ended or cancelled the reservation.
    """

    request_id: RequestId
    epoch: int
    reason: str
