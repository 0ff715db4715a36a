"""Registration, heartbeats, draining and loss of nodes."""

from __future__ import annotations

import math
from typing import TypeAlias, assert_never

from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import Disconnect, Log, LogLevel, SetTimer
from kvrelay.protocol.ids import NodeId, PeerId, peer_id
from kvrelay.protocol.messages.base import Heartbeat, Load
from kvrelay.protocol.messages.node_to_router import Drained, Leaving, Register
from kvrelay.protocol.messages.router_to_node import Drain, PrefillNodes, RegisterAgain, Registered, RegistrationRefused
from router.events import NodesFound, RegistryLost, RouterOutbox
from router.followed import FollowedNodes
from router.node_table import NodeTable
from router.requests import Requests

AboutNode: TypeAlias = Register | Heartbeat | Leaving | Drained
"""Messages in which a node reports its own state."""

LIVENESS = "liveness"
"""Key of the timer that calls ``check_liveness``."""


class Nodes:
    """Keeps the node table up to date and retries the requests of lost nodes.

    ``incarnation`` identifies this start of the router. Every ``heartbeat_s`` it sends heartbeats and checks liveness.
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
        heartbeat_s: float,
        peer_timeout_s: float,
    ) -> None:
        self._node_table = node_table
        self._followed = followed
        self._requests = requests
        self._outbox = outbox
        self._incarnation = incarnation
        self._heartbeat_s = heartbeat_s
        self._peer_timeout_s = peer_timeout_s
        self._liveness_due_s = math.inf
        self._may_have_lost_us: set[PeerId] = set()

    def heard(self, peer: PeerId) -> None:
        """Record a message from ``peer``: any message counts as a heartbeat."""
        self._node_table.heard(peer, self._outbox.now)

    def take(self, peer: PeerId, message: AboutNode) -> None:
        """Handle a message in which ``peer`` reports its own state."""
        match message:
            case Heartbeat(load=load):
                self._heartbeat(peer, load)
            case Register():
                self._register(peer, message)
            case Leaving():
                self._leave(peer)
            case Drained():
                self.lose(peer, "drained")
            case _:
                assert_never(message)

    # ------------------------------------------------------------ registration

    def follow(self, event: NodesFound | RegistryLost) -> None:
        """Connect to the nodes in the registry. If the registry is lost, keep the known nodes."""
        if isinstance(event, RegistryLost):
            self._followed.problem = event.reason
            return
        self._followed.problem = None
        for peer in self._followed.take(event.entries, registered=lambda peer: self._node_table.get(peer) is not None):
            self.lose(peer, "restarted")
        for node in self._node_table:
            node.leaving |= self._followed.is_draining(node.peer)

    def _register(self, peer: PeerId, message: Register) -> None:
        if peer in self._followed and peer != peer_id(message.node_id, message.incarnation):
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
            self._node_table.contest(rival, peer, message)
            # If its process has ended, this cannot be sent: it is lost at once, and the waiting node gets its name.
            self._outbox.send(rival.peer, Heartbeat())

    def _join(self, peer: PeerId, message: Register) -> None:
        known = self._node_table.get(peer)
        has_dropped_requests = known is not None and known.registration.session != message.session
        self._node_table.add(peer, message, self._outbox.now)
        # First, because the node takes requests only from a router that has registered it.
        self._outbox.send(peer, Registered(router_incarnation=self._incarnation))
        if message.role == Role.DECODE:
            self._outbox.send(peer, self._prefill_nodes())
        if known is None:
            if message.role == Role.PREFILL:
                self._name_prefill_nodes()
            self._log("info", "node registered", node=peer, role=message.role, address=message.address)
            self._requests.node_joined()
        elif has_dropped_requests and peer in self._may_have_lost_us:
            self._may_have_lost_us.discard(peer)
            self._requests.node_forgot(known)
        elif has_dropped_requests:
            self._requests.node_lost(known, "it had taken this router for lost")

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
            node.take_load(load)
        node.num_heartbeats += 1
        self._requests.node_reported()
        self._refuse_rival_of(peer)

    def _refuse_rival_of(self, peer: PeerId) -> None:
        """Refuse the waiting registration with the same name as ``peer``, which is alive."""
        waiting = self._node_table.settle(peer)
        if waiting is not None:
            other, message = waiting
            self._refuse(other, f"another live node is called {message.node_id}")

    # ------------------------------------------------------------ draining and loss

    def drain(self, node_id: NodeId) -> None:
        """Send the node nothing new and tell it to drain."""
        node = self._node_table.named(node_id)
        if node is not None and not node.leaving:
            node.leaving = True
            self._outbox.send(node.peer, Drain())

    def _leave(self, peer: PeerId) -> None:
        node = self._node_table.get(peer)
        if node is not None:
            node.leaving = True

    def lose(self, peer: PeerId, reason: str) -> None:
        """Remove a node and retry its requests on other nodes."""
        self._followed.forget(peer)
        node = self._node_table.remove(peer, self._outbox.now)
        if node is None:
            return
        self._log("info" if reason == "drained" else "warning", "node gone", node=peer, reason=reason)
        self._requests.counters.nodes_lost += reason != "drained"
        self._outbox.do(Disconnect(peer))
        if node.role is Role.PREFILL:
            self._name_prefill_nodes()
        self._requests.node_lost(node, reason)
        waiting = self._node_table.settle(peer)
        if waiting is not None:
            self._register(*waiting)

    def check_liveness(self) -> None:
        """Declare silent nodes lost, unless this process itself was paused.

        After a pause timers fire before sockets are read. The check is then skipped once, so that the messages received
        meanwhile are read first.
        """
        late_s = self._outbox.now - self._liveness_due_s
        if late_s > self._peer_timeout_s / 2:
            self._log("warning", "the router was held up and judges no node until its next heartbeat", late_s=late_s)
            # Each node may lose this router once per pause. A node that was paused itself costs attempts as usual.
            self._may_have_lost_us = {node.peer for node in self._node_table}
        else:
            for peer in self._node_table.silent(self._outbox.now):
                self.lose(peer, f"not heard for {self._peer_timeout_s:g} s")
        self._followed.beat()
        self._liveness_due_s = self._outbox.now + self._heartbeat_s
        self._outbox.do(SetTimer(LIVENESS, self._liveness_due_s))

    def _log(self, level: LogLevel, event: str, **fields: object) -> None:
        self._outbox.do(Log(level, event, fields))
