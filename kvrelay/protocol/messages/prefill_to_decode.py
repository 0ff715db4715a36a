"""P -> D. RenewReservations also serves as P's heartbeat to D."""

from __future__ import annotations

from kvrelay.protocol.ids import ROUTER, Attempt, PeerId, RequestId
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.request import RequestSpec


class ReserveBlocks(Message, frozen=True, kw_only=True):
    """P -> D, when P has allocated its own blocks for a prompt, and after AssignDecode.

    The reader answers BlocksReserved or ReservationRefused. A repetition before that answer gets no answer of its own.
    ``block_hashes`` are the chained hashes of the full blocks of the request's ``num_tokens`` tokens, ``max_tokens`` is
    the number of output tokens still to generate, ``router`` the router that the request belongs to.
    """

    request_id: RequestId
    epoch: int
    block_hashes: list[bytes]
    num_tokens: int
    max_tokens: int
    priority: int = 0
    router: PeerId = ROUTER


class HandOff(Message, frozen=True, kw_only=True):
    """P -> D, when P has sampled the first output token and D has granted the reservation.

    The last of ``request.output_token_ids`` is that token. The reader owns the request from here on. It decodes when
    the KV has arrived too. It needs no other sampler state, because random numbers depend on seed and position only. A
    hand-off without a valid reservation is answered with ReservationEnded. D then also sends the router RequestFailed,
    unless the reservation belongs to another P. If not ``may_be_shared``, the KV is from before a reset of P's prefix
    cache: the reader does not publish it.
    """

    request: RequestSpec
    num_cached_tokens: int
    may_be_shared: bool = True


class RenewReservations(Message, frozen=True, kw_only=True):
    """P -> D, once per ``heartbeat_s`` while P has reservations on D or has asked for some.

    The reader renews the lease of each of ``attempts``, and answers ReservationEnded for each that it does not know.
    The lease of a reservation that is not named expires, if its KV or hand-off is still missing.
    """

    attempts: list[Attempt]


class CancelReservation(Message, frozen=True, kw_only=True):
    """P -> D: P does not use the reservation: the request ended on P, its transfer failed, D did not answer in time, or
    BlocksReserved arrived when P no longer needed it.

    The reader ends the request and frees the blocks when no frame can be written to them any more. It ignores the
    message when both KV and hand-off have arrived: the request then belongs to D.
    """

    request_id: RequestId
    epoch: int
    reason: str
