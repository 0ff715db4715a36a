"""The sending end of a link: of which kinds it may be, and how much may be under way."""

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

MAX_FRAME_BYTES = 4 << 20
"""Payload of the largest frame: long enough to run at full speed, short enough that two transfers share a link well."""

MAX_INFLIGHT_FRAMES = 256
"""Frames without acknowledgement per link, however small: well below what a socket queues for a peer."""


class Route(NamedTuple):
    """Where to reach a messager, and the kinds of link that are possible there, the best first."""

    address: str
    offers: list[LinkOffer]


def choose_route(offers: Sequence[LinkOffer], here: str, peer: LinkAddress) -> Route:
    """Return the route from the host ``here`` to ``peer`` for the best of ``offers`` that reaches it.

    The others that use the same address are offered with it: the peer may not be able to accept the first. Raises
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

    ``ready`` holds the transfers that have something to send, in the order of their turns. Until D's messager has
    accepted the link it has no ``kind`` and no credit.
    """

    __slots__ = ("credit_bytes", "inflight_bytes", "inflight_frames", "kind", "offers", "peer", "ready", "transfers")

    def __init__(self, peer: PeerId, offers: list[LinkOffer]) -> None:
        self.peer = peer
        self.offers = offers
        self.kind = ""
        self.credit_bytes = 0
        self.inflight_bytes = 0
        self.inflight_frames = 0
        self.ready: deque[Transfer] = deque()
        self.transfers: dict[Transfer, None] = {}

    def accept(self, kind: str, credit_bytes: int) -> None:
        """Take the peer's answer. Raises TransferError if ``kind`` was not offered."""
        if kind not in [offer.kind for offer in self.offers]:
            raise TransferError(f"{self.peer} accepted a link of kind {kind!r:.40}, which was not offered")
        self.kind = kind
        self.credit_bytes = credit_bytes

    def blocks_per_frame(self, layer_block_bytes: int) -> int:
        """Return how many blocks a frame may hold: several frames fit into the credit, so that the link never idles."""
        return max(1, min(MAX_FRAME_BYTES, self.credit_bytes // 4) // layer_block_bytes)

    @property
    def room_bytes(self) -> int:
        """Bytes that may be sent now."""
        return self.credit_bytes - self.inflight_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Tell whether a frame of ``num_bytes`` may be sent now."""
        return num_bytes <= self.room_bytes and self.inflight_frames < MAX_INFLIGHT_FRAMES

    def enqueue(self, transfer: Transfer) -> None:
        """Give ``transfer`` a turn if it has something to send and waits for none yet."""
        if transfer.queue and transfer not in self.ready:
            self.ready.append(transfer)

    def drop(self, transfer: Transfer) -> None:
        """Send nothing more of ``transfer``."""
        transfer.drop_queue()
        if transfer in self.ready:
            self.ready.remove(transfer)

    def took(self, num_bytes: int) -> None:
        """Note a frame under way."""
        self.inflight_bytes += num_bytes
        self.inflight_frames += 1

    def returned(self, num_bytes: int) -> None:
        """Note that a frame was acknowledged."""
        self.inflight_bytes -= num_bytes
        self.inflight_frames -= 1
