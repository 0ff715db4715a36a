"""The sending ends of links: opening, acceptance, refusal, liveness and loss."""

from __future__ import annotations

from collections.abc import Sequence

from cache_messager.counters import Counters, links_counter
from cache_messager.frame_sender import FrameSender
from cache_messager.sender_link import SenderLink, choose_route
from cache_messager.transfer import TransferStatus
from cache_messager.transfers import Transfers
from cache_messager.work import LeaveLink, MessagerOutbox, OpenLink
from kvrelay.errors import GeometryMismatchError, PeerLostError, TransferError
from kvrelay.machine.contract import Connect, Disconnect, Log
from kvrelay.machine.liveness import Liveness
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import PeerId, peer_name
from kvrelay.protocol.messages.base import Heartbeat, LinkAddress
from kvrelay.protocol.messages.messager_to_messager import LinkAccepted, LinkHello, LinkOffer, LinkRefused


class SenderLinks:
    """Opens and drops ``links``, one per D's messager. ``offers``: links possible from host ``host_id``, best first."""

    def __init__(
        self,
        links: dict[PeerId, SenderLink],
        transfers: Transfers,
        frames: FrameSender,
        outbox: MessagerOutbox,
        counters: Counters,
        *,
        geometry: KVGeometry,
        host_id: str,
        offers: Sequence[LinkOffer],
        peer_timeout_s: float,
    ) -> None:
        self._links = links
        self._transfers = transfers
        self._frames = frames
        self._outbox = outbox
        self._counters = counters
        self._geometry = geometry
        self._host_id = host_id
        self._offers = offers
        self._liveness = Liveness(peer_timeout_s)
        self._failed: dict[PeerId, set[str]] = {}

    def link_to(self, address: LinkAddress) -> SenderLink:
        """Return the link to D's messager, opened if there is none. Raises TransferError if no offer reaches it."""
        peer = address.peer
        if peer in self._links:
            return self._links[peer]
        route = choose_route(self._offers, self._host_id, address, self._failed.get(peer, ()))
        link = self._links[peer] = SenderLink(peer, route.offers, route.passed_over)
        self._liveness.watch(peer, self._outbox.now)
        self._outbox.do(Connect(peer, route.address))
        self._outbox.send(peer, LinkHello(geometry=self._geometry, offers=route.offers))
        return link

    def accepted(self, peer: PeerId, message: LinkAccepted) -> None:
        """D's messager accepted the link."""
        link = self._links.get(peer)
        if link is None or link.kind:
            return
        if message.credit_bytes < self._geometry.layer_block_bytes or message.max_frames < 1:
            self.lose(link, TransferError(f"{peer_name(peer)} has no room for even one block"))
            return
        try:
            link.accept(message.kind, message.credit_bytes, message.max_frames)
        except TransferError as error:
            self.lose(link, error)
            return
        self._outbox.do(OpenLink(peer, link.kind, message.handle))
        self._counters[links_counter(link.kind)] += 1
        passed_over = "; ".join(filter(None, [*link.passed_over, message.passed_over])) or "none"
        self._outbox.do(Log("info", "link open", {"peer": peer, "link": link.kind, "passed_over": passed_over}))
        self._frames.pump(link)

    def refused(self, peer: PeerId, message: LinkRefused) -> None:
        """D's messager refused the link, or closed it."""
        link = self._links.get(peer)
        if link is not None:
            kind = GeometryMismatchError if message.code == GeometryMismatchError.code else TransferError
            self.lose(link, kind(f"{peer} refused the link: {message.reason}"))

    def peer_lost(self, peer: PeerId, reason: str) -> None:
        """The connection to ``peer`` is lost."""
        link = self._links.get(peer)
        if link is not None:
            self.lose(link, PeerLostError(f"{peer_name(peer)} is lost: {reason}"))

    def link_lost(self, peer: PeerId, reason: str) -> None:
        """The link cannot move bytes to ``peer`` any more. If it has moved none, others are preferred from now on."""
        link = self._links.get(peer)
        if link is not None:
            if not link.has_moved:
                self._failed.setdefault(peer, set()).add(link.kind)
            self.lose(link, PeerLostError(f"the {link.kind} link to {peer_name(peer)} is lost: {reason}"))

    def lose(self, link: SenderLink, error: TransferError) -> None:
        """Drop the link with its queued frames. From here on nothing reads P's blocks for it."""
        del self._links[link.peer]
        self._liveness.forget(link.peer)
        self._counters["links_lost"] += 1
        self._outbox.do(Log("warning", "link lost", {"peer": link.peer, "reason": error.message}))
        self._outbox.do(Disconnect(link.peer))
        if link.kind:
            self._outbox.do(LeaveLink(link.peer, link.kind))
        for transfer in list(link.transfers):
            transfer.inflight.clear()
            if transfer.status is TransferStatus.SENDING:
                self._transfers.fail(transfer, error)
            else:
                self._transfers.finish(transfer)

    # ------------------------------------------------------------ time

    def record_message(self, peer: PeerId) -> None:
        """Record a message from ``peer``: any message counts as a heartbeat."""
        self._liveness.record_message(peer, self._outbox.now)

    def resumed(self, paused_s: float) -> None:
        """This process did not run for ``paused_s``: no peer is to blame for its silence."""
        self._liveness.resumed(paused_s, self._outbox.now)

    def lose_silent(self) -> None:
        """Drop the links to peers that sent nothing for ``peer_timeout_s``."""
        for peer in self._liveness.lost(self._outbox.now):
            self.peer_lost(peer, "no heartbeat")

    def beat(self) -> None:
        """Send a heartbeat on every link."""
        for peer in self._links:
            self._outbox.send(peer, Heartbeat())

    def disconnect(self) -> None:
        """Drop every connection, before the process exits."""
        for peer in self._links:
            self._outbox.do(Disconnect(peer))
