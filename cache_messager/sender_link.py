"""The sending end of a link: its possible kinds and its credit."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from cache_messager.links import link_class
from cache_messager.transfer import Transfer
from kvrelay.errors import TransferError
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import LinkOffer

MAX_INFLIGHT_FRAMES = 256
"""Maximum unacknowledged frames per link of any size: well below the send queue of a socket."""


class Route(NamedTuple):
    """Address of a messager, and the offers possible at that address, best first."""

    address: str
    offers: list[LinkOffer]


def choose_route(offers: Sequence[LinkOffer], here: str, peer: LinkAddress) -> Route:
    """Return the route from the host ``here`` to ``peer`` for the best of ``offers`` that reaches it.

    It includes all offers for the same address, because the peer may not be able to accept the best one. Raises
    TransferError if none reaches ``peer``.
    """
    reached = [(address, offer) for offer in offers if (address := link_class(offer.kind).address(here, peer))]
    if not reached:
        kinds = ", ".join(offer.kind for offer in offers) or "none"
        where = "on this host" if peer.host_id == here else "on another host"
        raise TransferError(f"no link reaches {peer.peer}, which is {where}; possible and allowed here: {kinds}")
    best = reached[0][0]
    return Route(best, [offer for address, offer in reached if address == best])


class SenderLink:
    """One connection to D's messager, shared by all transfers to that D.

    ``ready`` holds the transfers with queued blocks, in round-robin order. Until D's messager has accepted the link, it
    has no ``kind`` and no credit.
    """

    __slots__ = (
        "credit_bytes",
        "inflight_bytes",
        "inflight_frames",
        "kind",
        "max_frame_bytes",
        "offers",
        "peer",
        "ready",
        "transfers",
    )

    def __init__(self, peer: PeerId, offers: list[LinkOffer]) -> None:
        self.peer = peer
        self.offers = offers
        self.kind = ""
        self.max_frame_bytes = 0
        self.credit_bytes = 0
        self.inflight_bytes = 0
        self.inflight_frames = 0
        self.ready: deque[Transfer] = deque()
        self.transfers: dict[Transfer, None] = {}

    def accept(self, kind: str, credit_bytes: int) -> None:
        """Record the accepted kind and the credit. Raises TransferError if ``kind`` was not offered."""
        if kind not in [offer.kind for offer in self.offers]:
            raise TransferError(f"{self.peer} accepted a link of kind {kind!r:.40}, which was not offered")
        self.kind = kind
        self.max_frame_bytes = link_class(kind).max_frame_bytes
        self.credit_bytes = credit_bytes

    def blocks_per_frame(self, layer_block_bytes: int) -> int:
        """Return the maximum blocks per frame. Several frames fit into the credit, so that the link does not idle."""
        return max(1, min(self.max_frame_bytes, self.credit_bytes // 4) // layer_block_bytes)

    @property
    def room_bytes(self) -> int:
        """Bytes that may be sent now."""
        return self.credit_bytes - self.inflight_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Return whether a frame of ``num_bytes`` may be sent now."""
        return num_bytes <= self.room_bytes and self.inflight_frames < MAX_INFLIGHT_FRAMES

    def enqueue(self, transfer: Transfer) -> None:
        """Add ``transfer`` to ``ready`` if it has queued blocks and is not there yet."""
        if transfer.queue and transfer not in self.ready:
            self.ready.append(transfer)

    def drop(self, transfer: Transfer) -> None:
        """Drop the queued blocks of ``transfer`` and its place in ``ready``."""
        transfer.drop_queue()
        if transfer in self.ready:
            self.ready.remove(transfer)

    def take_credit(self, num_bytes: int) -> None:
        """Take credit for a sent frame."""
        self.inflight_bytes += num_bytes
        self.inflight_frames += 1

    def return_credit(self, num_bytes: int) -> None:
        """Return the credit of an acknowledged frame."""
        self.inflight_bytes -= num_bytes
        self.inflight_frames -= 1
