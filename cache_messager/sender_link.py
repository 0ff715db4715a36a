"""The sending end of a link: its possible kinds and its credit."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from cache_messager.links import link_class
from cache_messager.transfer import Transfer
from kvrelay.errors import TransferError
from kvrelay.machine.laws import Violation
from kvrelay.machine.speed import Speed
from kvrelay.protocol.ids import PeerId, peer_name
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import MAX_INFLIGHT_FRAMES, KVFrame, LinkOffer


class Route(NamedTuple):
    """Address of a messager, and the offers possible at that address, best first.

    ``passed_over``: why better ones are not among them.
    """

    address: str
    offers: list[LinkOffer]
    passed_over: list[str]


def choose_route(offers: Sequence[LinkOffer], here: str, peer: LinkAddress, failed: Collection[str] = ()) -> Route:
    """Return the route from the host ``here`` to ``peer`` for the best of ``offers`` that reaches it.

    It includes all offers for the same address, because the peer may not be able to accept the best one. Kinds that
    have ``failed`` are used only if no other reaches ``peer``. Raises TransferError if none does.
    """
    reached = [(address, offer) for offer in offers if (address := link_class(offer.kind).address(here, peer))]
    reached = [(address, offer) for address, offer in reached if offer.kind not in failed] or reached
    if not reached:
        kinds = ", ".join(offer.kind for offer in offers) or "none"
        where = "on this host" if peer.host_id == here else "on another host"
        raise TransferError(
            f"no link reaches {peer_name(peer.peer)}, which is {where}; possible and allowed here: {kinds}"
        )
    best, first = reached[0]
    better = [offer.kind for offer in offers[: offers.index(first)]]
    passed_over = [f"{kind}: {'has failed' if kind in failed else 'not to another host'}" for kind in better]
    return Route(best, [offer for address, offer in reached if address == best], passed_over)


class SenderLink:
    """One connection to D's messager, shared by all transfers to that D.

    ``ready`` holds the transfers with queued blocks, in round-robin order. Until D's messager has accepted the link, it
    has no ``kind`` and no credit. ``passed_over``: why better kinds are not offered. ``has_moved``: whether D has
    acknowledged a frame. ``speed``: bytes written per second while bytes are under way.
    """

    __slots__ = (
        "_busy_since_s",
        "_free_slots",
        "_num_slots",
        "credit_bytes",
        "has_moved",
        "inflight_bytes",
        "kind",
        "max_frame_bytes",
        "offers",
        "passed_over",
        "peer",
        "ready",
        "speed",
        "transfers",
    )

    def __init__(self, peer: PeerId, offers: list[LinkOffer], passed_over: Sequence[str] = ()) -> None:
        self.peer = peer
        self.offers = offers
        self.passed_over = passed_over
        self.kind = ""
        self.max_frame_bytes = 0
        self.credit_bytes = 0
        self.inflight_bytes = 0
        self.has_moved = False
        self.ready: deque[Transfer] = deque()
        self.transfers: dict[Transfer, None] = {}
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._busy_since_s = 0.0
        self.speed = Speed()

    def accept(self, kind: str, credit_bytes: int, max_frames: int) -> None:
        """Record the accepted kind and the credit. Raises TransferError if ``kind`` was not offered."""
        if kind not in [offer.kind for offer in self.offers]:
            raise TransferError(f"{peer_name(self.peer)} accepted a link of kind {kind!r:.40}, which was not offered")
        self.kind = kind
        self.max_frame_bytes = link_class(kind).max_frame_bytes
        self.credit_bytes = credit_bytes
        self._num_slots = min(max_frames, MAX_INFLIGHT_FRAMES)
        self._free_slots = list(range(self._num_slots))

    def blocks_per_frame(self, layer_block_bytes: int) -> int:
        """Return the maximum blocks per frame. Several frames fit into the credit, so that the link does not idle."""
        return max(1, min(self.max_frame_bytes, self.credit_bytes // 4) // layer_block_bytes)

    @property
    def room_bytes(self) -> int:
        """Bytes that may be sent now."""
        return self.credit_bytes - self.inflight_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Return whether a frame of ``num_bytes`` may be sent now."""
        return num_bytes <= self.room_bytes and bool(self._free_slots)

    def enqueue(self, transfer: Transfer) -> None:
        """Add ``transfer`` to ``ready`` if it has queued blocks and is not there yet."""
        if transfer.queue and transfer not in self.ready:
            self.ready.append(transfer)

    def drop(self, transfer: Transfer) -> None:
        """Drop the queued blocks of ``transfer`` and its place in ``ready``."""
        transfer.drop_queue()
        if transfer in self.ready:
            self.ready.remove(transfer)

    def take(self, num_bytes: int, now: float) -> int:
        """Take credit for a frame; return its slot."""
        if not self.inflight_bytes:
            self._busy_since_s = now
        self.inflight_bytes += num_bytes
        return self._free_slots.pop()

    def give_back(self, frame: KVFrame) -> None:
        """Return the credit of an acknowledged frame."""
        self.inflight_bytes -= frame.num_bytes
        self._free_slots.append(frame.slot)

    def written(self, frame: KVFrame, now: float) -> None:
        """Record that D has written ``frame``."""
        self.has_moved = True
        self.speed.add(frame.num_bytes, now - self._busy_since_s, now)
        self._busy_since_s = now

    def violations_at_rest(self) -> list[Violation]:
        """Check that all credit and every slot is back, and no transfer waits; return what is wrong."""
        found = []
        if self.inflight_bytes:
            found.append(Violation(f"sender not quiescent: {self.inflight_bytes} bytes under way to {self.peer}"))
        if sorted(self._free_slots) != list(range(self._num_slots)):
            text = (
                f"{len(self._free_slots)} of {self._num_slots} frame slots to {self.peer} are free, or some are twice"
            )
            found.append(Violation(text))
        if self.ready or self.transfers:
            found.append(Violation(f"{len(self.transfers)} transfers to {self.peer}, {len(self.ready)} of them ready"))
        return found
