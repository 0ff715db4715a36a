"""P -> D. (Besides these, Heartbeat.)"""

from __future__ import annotations

from kvrelay.protocol.ids import ROUTER, PeerId
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.request import RequestSpec


class ReserveBlocks(Message, frozen=True, kw_only=True):
    """P -> D, when P begins a prompt.

    The reader always answers: BlocksReserved or ReservationRefused. ``block_hashes`` are the chained hashes of the full
    blocks of the ``num_tokens`` tokens to come, ``router`` is whose request it is.
    """

    request_id: str
    epoch: int
    block_hashes: list[bytes]
    num_tokens: int
    max_tokens: int
    priority: int = 0
    router: PeerId = ROUTER


class HandOff(Message, frozen=True, kw_only=True):
    """P -> D, with the first output token (the last in ``request.output_token_ids``).

    The reader owns the request from here on; it decodes when the KV is there too. The sampler's state is the request's
    parameters and its tokens: random numbers are keyed by seed and position.
    """

    request: RequestSpec
    num_cached_tokens: int


class RenewReservations(Message, frozen=True, kw_only=True):
    """P -> D, once per ``heartbeat_s`` while P holds reservations there.

    The reader renews the lease of each one named, by (request_id, epoch); one that is no longer named runs out.
    """

    attempts: list[tuple[str, int]]


class CancelReservation(Message, frozen=True, kw_only=True):
    """P -> D: the request ended before its hand-off, or the transfer failed.

    The reader releases the blocks as soon as no frame can be written to them any more.
    """

    request_id: str
    epoch: int
    reason: str
