"""The receiving ends of links: accepting, refusing, liveness and loss."""

from __future__ import annotations

from dataclasses import dataclass

from cache_messager.counters import Counters
from cache_messager.expectation import ExpectationStatus
from cache_messager.expectations import Expectations
from cache_messager.work import AcceptLink, DropLink, LinkReady, MessagerOutbox
from kvrelay.errors import GeometryMismatchError, PeerLostError, TransferError
from kvrelay.machine.contract import Log
from kvrelay.machine.liveness import Liveness
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import PeerId, peer_name
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.protocol.messages.messager_to_messager import LinkAccepted, LinkHello, LinkRefused


@dataclass(slots=True)
class ReceiverLink:
    """The receiving end of a link. ``accepted`` is None until an offer has been accepted."""

    link_id: int
    peer: PeerId
    hello: LinkHello
    accepted: LinkAccepted | None = None
    unacked_bytes: int = 0


class ReceiverLinks:
    """Accepts and drops links, one per sender, indexed by sender and by ``link_id``.

    A sender may have at most ``credit_bytes`` of KV unacknowledged.
    """

    def __init__(
        self,
        expectations: Expectations,
        outbox: MessagerOutbox,
        counters: Counters,
        *,
        geometry: KVGeometry,
        credit_bytes: int,
        peer_timeout_s: float,
    ) -> None:
        self._expectations = expectations
        self._outbox = outbox
        self._counters = counters
        self._geometry = geometry
        self._credit_bytes = credit_bytes
        self._links: dict[PeerId, ReceiverLink] = {}
        self._links_by_id: dict[int, ReceiverLink] = {}
        self._last_link_id = 0
        self._liveness = Liveness(peer_timeout_s)

    def __len__(self) -> int:
        return len(self._links)

    def get(self, peer: PeerId) -> ReceiverLink | None:
        """Return the link that ``peer`` has opened, or None."""
        return self._links.get(peer)

    def get_by_id(self, link_id: int) -> ReceiverLink | None:
        """Return the link with this ``link_id``, or None."""
        return self._links_by_id.get(link_id)

    def hello(self, peer: PeerId, message: LinkHello) -> None:
        """A sender opens a link, or repeats its LinkHello."""
        known = self._links.get(peer)
        if known is not None and known.hello == message:
            if known.accepted is not None:
                self._outbox.send(peer, known.accepted)
            return
        if known is not None:
            self._drop(known, PeerLostError(f"{peer_name(peer)} opened its link anew"))
        differences = self._geometry.differences(message.geometry)
        if differences:
            self.refuse(peer, "; ".join(differences), GeometryMismatchError.code)
            return
        self._last_link_id += 1
        link = ReceiverLink(self._last_link_id, peer, message)
        self._links[peer] = self._links_by_id[link.link_id] = link
        self._liveness.watch(peer, self._outbox.now)
        self._outbox.do(AcceptLink(link.link_id, message.offers))

    def ready(self, event: LinkReady) -> None:
        """The service accepted one of the offers, or none."""
        link = self._links_by_id.get(event.link_id)
        if link is None:
            if event.kind is not None:
                self._outbox.do(DropLink(event.link_id))
        elif event.kind is None:
            reason = f"none of the links offered is possible: {event.reason}"
            self.refuse(link.peer, reason, TransferError.code)
            self._drop(link, TransferError(reason))
        else:
            link.accepted = LinkAccepted(
                kind=event.kind,
                credit_bytes=self._credit_bytes,
                max_frames=event.max_frames,
                handle=event.handle,
                passed_over=event.reason,
            )
            self._outbox.send(link.peer, link.accepted)

    def refuse(self, peer: PeerId, reason: str, code: str = TransferError.code) -> None:
        """Send LinkRefused to ``peer``."""
        self._counters["links_refused"] += 1
        self._outbox.do(Log("warning", "link refused", {"peer": peer, "reason": reason}))
        self._outbox.send(peer, LinkRefused(reason=reason, code=code))

    def peer_lost(self, peer: PeerId, reason: str) -> None:
        """The connection to ``peer`` is lost."""
        link = self._links.get(peer)
        if link is not None:
            self._outbox.do(Log("warning", "sender lost", {"peer": peer, "reason": reason}))
            self._drop(link, PeerLostError(f"{peer_name(peer)} is lost: {reason}"))

    def _drop(self, link: ReceiverLink, error: TransferError) -> None:
        """Remove ``link`` and fail the expectations that receive over it."""
        del self._links[link.peer], self._links_by_id[link.link_id]
        self._liveness.forget(link.peer)
        self._counters["links_lost"] += 1
        for expectation in self._expectations:
            if expectation.link_id == link.link_id and expectation.status is ExpectationStatus.RECEIVING:
                self._expectations.fail(expectation, error)
        self._release(link)

    def _release(self, link: ReceiverLink) -> None:
        if link.accepted is not None:
            self._outbox.do(DropLink(link.link_id))

    # ------------------------------------------------------------ time

    def record_message(self, peer: PeerId) -> None:
        """Record a message from ``peer``: any message counts as a heartbeat."""
        self._liveness.record_message(peer, self._outbox.now)

    def resumed(self, paused_s: float) -> None:
        """This process did not run for ``paused_s``: no peer is to blame for its silence."""
        self._liveness.resumed(paused_s, self._outbox.now)

    def beat(self) -> None:
        """Drop the links of silent senders; send a heartbeat on every other link."""
        for peer in self._liveness.lost(self._outbox.now):
            self.peer_lost(peer, "no heartbeat")
        for peer in self._links:
            self._outbox.send(peer, Heartbeat())

    def leave(self) -> None:
        """Refuse further frames of every sender, before the process exits."""
        for link in self._links.values():
            self._outbox.send(link.peer, LinkRefused(reason="its node is leaving"))
            self._release(link)

    @property
    def unacked_bytes(self) -> int:
        """Bytes being written, over all links."""
        return sum(link.unacked_bytes for link in self._links.values())
