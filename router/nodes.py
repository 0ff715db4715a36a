"""Registration, heartbeats, draining and loss of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, assert_never

from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import Log, LogLevel, SetTimer
from kvrelay.protocol.ids import NodeId, PeerId, peer_id
from kvrelay.protocol.messages.base import Heartbeat, Load
from kvrelay.protocol.messages.node_to_router import Drained, Leaving, PrefixCacheChanged, Register
from kvrelay.protocol.messages.router_to_node import (
    Drain,
    Dump,
    PrefillNodes,
    RegisterAgain,
    Registered,
    RegistrationRefused,
)
from router.events import DumpRequested, NodesFound, RegistryLost, RouterOutbox
from router.followed import FollowedNodes
from router.node_table import Node, NodeTable
from router.requests import Requests

AboutNode: TypeAlias = Register | Heartbeat | PrefixCacheChanged | Leaving | Drained
"""Messages in which a node reports its own state."""

LIVENESS = "liveness"
"""Key of the timer that calls ``check_liveness``."""


class Nodes:
    """Keeps the node table up to date and retries the requests of lost nodes.

    ``incarnation`` identifies this start of the router. ``wants_prefixes``: nodes report their prefix caches. Every
    ``heartbeat_s`` it sends heartbeats and checks liveness.
    A node is lost when it sent nothing for ``peer_timeout_s``.
    """

    def __init__(
        self,
        node_table: NodeTable,
        followed: FollowedNodes,
        requests: Requests,
        outbox: RouterOutbox,
        *,
        incarnation: str,
        wants_prefixes: bool,
        heartbeat_s: float,
        peer_timeout_s: float,
    ) -> None:
        self._node_table = node_table
        self._followed = followed
        self._requests = requests
        self._outbox = outbox
        self._registered = Registered(
            router_incarnation=incarnation, wants_prefixes=wants_prefixes, wants_attempts=True
        )
        self._heartbeat_s = heartbeat_s
        self._peer_timeout_s = peer_timeout_s
        self._may_have_lost_us: set[PeerId] = set()

    def record_message(self, peer: PeerId) -> None:
        """Record a message from ``peer``: any message counts as a heartbeat."""
        self._node_table.record_message(peer, self._outbox.now)

    def take(self, peer: PeerId, message: AboutNode) -> None:
        """Handle a message in which ``peer`` reports its own state."""
        match message:
            case Heartbeat(load=load):
                self._heartbeat(peer, load)
            case Register():
                self._register(peer, message)
            case PrefixCacheChanged():
                self._prefixes_changed(peer, message)
            case Leaving():
                self._leave(peer)
            case Drained():
                self.lose(peer, "drained")
            case _:
                assert_never(message)

    # ------------------------------------------------------------ registration

    def follow(self, event: NodesFound | RegistryLost) -> None:
        """Connect to the nodes in the registry. If the registry is lost, go on with the nodes that it last had."""
        if isinstance(event, RegistryLost):
            self._followed.registry_lost(event.reason)
            return
        for peer in self._followed.take(event.entries, registered=lambda peer: self._node_table.get(peer) is not None):
            self.lose(peer, "restarted")
        for node in self._node_table:
            node.leaving |= self._followed.is_draining(node.peer)

    def _register(self, peer: PeerId, message: Register) -> None:
        if peer in self._followed and peer != peer_id(message.node_id, message.incarnation):
            self._followed.answered_by_another(peer, message)
            self.lose(peer, f"{message.node_id}#{message.incarnation} is at its address")
            return
        reason = self._node_table.mismatch(peer, message)
        if reason is not None:
            self._refuse(peer, reason)
            return
        rival = self._node_table.rival(message)
        if rival is None:
            self._join(peer, message)
        elif peer in self._followed and rival.registration.address == message.address:
            # Two processes cannot listen at one address, and the router itself has connected to it.
            self.lose(rival.peer, "restarted")
            self._join(peer, message)
        else:
            self._node_table.contest(rival, peer, message, self._outbox.now)
            # If its process has ended, this cannot be sent: it is lost at once, and the waiting node gets its name.
            self._outbox.send(rival.peer, Heartbeat())

    def _join(self, peer: PeerId, message: Register) -> None:
        known = self._node_table.get(peer)
        lost_us = known is not None and known.registration.session != message.session
        node = self._node_table.add(peer, message, self._outbox.now)
        # Before any request: the node takes none from a router that has not registered it.
        self._outbox.send(peer, self._registered)
        if message.role == Role.DECODE:
            self._outbox.send(peer, self._prefill_nodes())
        if known is None:
            if message.role == Role.PREFILL:
                self._name_prefill_nodes()
            self._log("info", "node registered", node=peer, role=message.role, address=message.address)
            self._requests.node_joined()
        elif lost_us and peer in self._may_have_lost_us:
            self._may_have_lost_us.discard(peer)
            self._requests.node_dropped_requests(node)
        elif lost_us:
            self._requests.node_lost(node, "it had taken this router for lost")

    def _prefill_nodes(self) -> PrefillNodes:
        return PrefillNodes(peers=[node.peer for node in self._node_table if node.role is Role.PREFILL])

    def _name_prefill_nodes(self) -> None:
        """Tell every decode node which prefill nodes there are now."""
        message = self._prefill_nodes()
        for node in self._node_table:
            if node.role is Role.DECODE:
                self._outbox.send(node.peer, message)

    def _refuse(self, peer: PeerId, reason: str) -> None:
        self._requests.counters.registrations_refused += 1
        self._log("error", "registration refused", peer=peer, reason=reason)
        self._outbox.send(peer, RegistrationRefused(reason=reason))

    # ------------------------------------------------------------ heartbeats

    def _heartbeat(self, peer: PeerId, load: Load | None) -> None:
        node = self._node_table.get(peer)
        if node is None:
            self._outbox.send(peer, RegisterAgain())
            return
        if load is not None:
            self._node_table.take_load(node, load)
        node.num_heartbeats += 1
        node.prefixes.count_heartbeat()
        self._requests.node_reported()
        self._refuse_rivals_of(peer)

    def _refuse_rivals_of(self, peer: PeerId) -> None:
        for rival in self._node_table.beaten_by(peer, self._outbox.now):
            self._refuse(rival.peer, f"another live node is called {rival.registration.node_id}")

    def _prefixes_changed(self, peer: PeerId, message: PrefixCacheChanged) -> None:
        node = self._node_table.get(peer)
        if node is not None and not node.prefixes.take(message):
            # It begins anew. To register again it would first forget this router, and drop what is on its way to it.
            self._outbox.send(peer, self._registered)

    # ------------------------------------------------------------ draining and loss

    def drain(self, node_id: NodeId, *, stay_down: bool) -> None:
        """Send the node nothing new and tell it to drain, and to stay down if ``stay_down``."""
        node = self._node_table.named(node_id)
        if node is not None and (stay_down or not node.leaving):
            node.leaving = True
            self._outbox.send(node.peer, Drain(stay_down=stay_down))

    def dump(self, wanted: DumpRequested) -> None:
        """Ask the node for its recording, if it is there and reads Dump."""
        node = self._node_table.named(wanted.node_id)
        if node is not None and node.registration.can_dump:
            self._outbox.send(node.peer, Dump(dump_id=wanted.dump_id, with_prompts=wanted.with_prompts))

    def _leave(self, peer: PeerId) -> None:
        node = self._node_table.get(peer)
        if node is not None:
            node.leaving = True

    def lose(self, peer: PeerId, reason: str) -> None:
        """Remove a node and retry its requests on other nodes."""
        self._lose_together([peer], reason)

    def _lose_together(self, peers: Sequence[PeerId], reason: str) -> None:
        """Remove all of ``peers`` before requests are retried: a retry on a node that is lost too costs an attempt."""
        lost = [node for peer in peers if (node := self._remove(peer, reason)) is not None]
        if any(node.role is Role.PREFILL for node in lost):
            self._name_prefill_nodes()
        for node in lost:
            self._requests.node_lost(node, reason)
        for node in lost:
            heir = self._node_table.heir_of(node.peer, self._outbox.now)
            if heir is not None:
                self._register(heir.peer, heir.registration)

    def _remove(self, peer: PeerId, reason: str) -> Node | None:
        self._followed.forget(peer)
        node = self._node_table.remove(peer, self._outbox.now)
        if node is not None:
            if reason == "drained":
                self._log("info", "node left", node=peer, reason=reason)
            else:
                self._log("warning", "node lost", node=peer, reason=reason)
                self._requests.counters.nodes_lost += 1
        return node

    def resumed(self, paused_s: float) -> None:
        """This process did not run for ``paused_s``: no node is to blame for what it did not read meanwhile.

        Nodes may have taken this router for lost. Each may do so once per pause without costing its requests an
        attempt. A node that was paused itself costs attempts as usual.
        """
        self._node_table.resumed(paused_s, self._outbox.now)
        self._may_have_lost_us = {node.peer for node in self._node_table}

    def check_liveness(self) -> None:
        """Declare silent nodes lost."""
        silent = self._node_table.silent(self._outbox.now)
        self._lose_together(silent, f"not heard for {self._peer_timeout_s:g} s")
        self._followed.beat()
        self._outbox.do(SetTimer(LIVENESS, self._outbox.now + self._heartbeat_s))

    def _log(self, level: LogLevel, event: str, **fields: object) -> None:
        self._outbox.do(Log(level, event, fields))
