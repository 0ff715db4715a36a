"""Registration at routers and heartbeats: a part of a node's machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias, assert_never

import msgspec

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.machine.contract import Announce, Exit, Log, NodeState, Ready
from kvrelay.machine.liveness import Liveness
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import ROUTER, PeerId, peer_name
from kvrelay.protocol.messages import router_to_node
from kvrelay.protocol.messages.base import Heartbeat, Load, Message
from kvrelay.protocol.messages.node_to_router import Drained, Leaving, Register
from kvrelay.protocol.messages.router_to_node import RegisterAgain, Registered, RegistrationRefused

REFUSED = "registration refused"
"""Reason of the Exit that follows a RegistrationRefused: the process ends with status 2 and is not restarted."""

READY: NodeState = "ready"
DRAINING: NodeState = "draining"

RegistrationMessage: TypeAlias = RegisterAgain | RegistrationRefused | Heartbeat
"""Messages that Membership takes, besides Registered."""


class Membership:
    """Registers until a router answers, then sends heartbeats. A router that does not know the node is told again.

    With a static registry there is one router, to which the shell has connected and which it calls ROUTER: it is never
    lost, only replaced by its next incarnation. Otherwise the node announces itself and any number of routers connect
    to it, as ``router#incarnation``; one that is silent for ``peer_timeout_s`` is lost.
    """

    def __init__(self, registration: Register, node: NodeConfig, outbox: Outbox) -> None:
        self._registration = registration
        self._outbox = outbox
        self._is_static = node.registry.kind == "static"
        self._alive = Liveness(node.cluster.peer_timeout_s)
        self._registered: dict[PeerId, str] = {}
        """Routers this node is registered with, and their incarnations."""
        self._last_incarnation: str | None = None
        self.has_joined = False
        self._leaving = False

    # ------------------------------------------------------------ who is there

    def is_router(self, peer: PeerId) -> bool:
        """Return whether ``peer`` is a router, or says so: anybody can reach the node's port."""
        return peer == ROUTER if self._is_static else peer_name(peer) == ROUTER

    def is_authorized(self, peer: PeerId, message: Message) -> bool:
        """Return whether ``peer`` may send ``message``: anybody may, unless it is one that only routers send."""
        if type(message).__module__ != router_to_node.__name__:
            return True
        about_registration = isinstance(message, Registered | RegisterAgain | RegistrationRefused)
        known = self._is_static or about_registration or peer in self._registered
        return known and self.is_router(peer)

    @property
    def routers(self) -> Iterable[PeerId]:
        """The routers that the node is registered with."""
        return self._registered.keys()

    # ------------------------------------------------------------ coming and staying

    def join(self) -> None:
        """Ask to be registered: the node can serve."""
        self.has_joined = True
        self._outbox.do(Ready())
        if self._is_static:
            self._outbox.send(ROUTER, self._registration)
        else:
            self._outbox.do(Announce(READY))

    def beat(self, load: Load) -> None:
        """Send every router a heartbeat, or ask again to be registered."""
        if self._is_static and not self._registered:
            self.join()
        for router in self._registered:
            self._outbox.send(router, Heartbeat(load=load))

    def register_again(self) -> None:
        """Have every router answer the registration again, and say what it says then."""
        for router in self._registered:
            self._outbox.send(router, self._registration)

    def record_message(self, peer: PeerId) -> None:
        """Note that a message of ``peer`` arrived, if it is a router."""
        self._alive.record_message(peer, self._outbox.now)

    def receive(self, peer: PeerId, message: RegistrationMessage) -> None:
        """Take one of a router's other messages about registration, or anybody's heartbeat."""
        match message:
            case Heartbeat():
                self._on_router_found(peer)
            case RegisterAgain():
                self._forget(peer)
                self._outbox.send(peer, self._registration)
            case RegistrationRefused(reason=reason):
                self._outbox.do(Log("error", REFUSED, {"reason": reason}), Exit(REFUSED))
            case _:
                assert_never(message)

    def _on_router_found(self, peer: PeerId) -> None:
        """Tell a router that has found this node, and does not know it yet, what it is."""
        if not self._is_static and self.has_joined and self.is_router(peer) and peer not in self._registered:
            self._outbox.send(peer, self._registration)

    def registered(self, peer: PeerId, incarnation: str) -> bool:
        """Note that the router ``peer`` has registered this node.

        Returns whether it is another router than ``peer`` was before: then nobody waits for what this node still holds
        for it.
        """
        changed = self._is_static and self._last_incarnation not in (None, incarnation)
        if self._registered.get(peer) != incarnation:
            self._outbox.do(Log("info", "registered", {"router": incarnation}))
        self._registered[peer] = self._last_incarnation = incarnation
        if not self._is_static:
            self._alive.watch(peer, self._outbox.now)
        if self._leaving:  # a router that lost this node meanwhile takes it for a new one
            self._outbox.send(peer, Leaving())
        return changed

    # ------------------------------------------------------------ losing routers

    def resumed(self, paused_s: float) -> None:
        """This process did not run for ``paused_s``: no router is to blame for its silence."""
        self._alive.resumed(paused_s, self._outbox.now)

    def silent(self) -> list[PeerId]:
        """Return the routers silent for ``peer_timeout_s``; each is returned once."""
        return self._alive.lost(self._outbox.now)

    def lost(self, router: PeerId) -> bool:
        """Forget ``router``, whose requests the caller drops. If it comes back, it is told so by a new session.

        Returns whether it was known.
        """
        known = router in self._registered
        self._forget(router)
        if known:
            session = self._registration.session + 1
            self._registration = msgspec.structs.replace(self._registration, session=session)
        return known

    def _forget(self, router: PeerId) -> None:
        self._registered.pop(router, None)
        self._alive.forget(router)

    # ------------------------------------------------------------ leaving

    def leave(self) -> None:
        """Tell every router that the node takes nothing new."""
        self._leaving = True
        if self.has_joined and not self._is_static:
            self._outbox.do(Announce(DRAINING))
        for router in self._routers():
            self._outbox.send(router, Leaving())

    def drained(self) -> None:
        """Tell every router that the node holds nothing any more."""
        for router in self._routers():
            self._outbox.send(router, Drained())

    def _routers(self) -> list[PeerId]:
        return [ROUTER] if self._is_static else list(self._registered)
