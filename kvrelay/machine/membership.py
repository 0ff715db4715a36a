"""A node's registration with its routers: the part of a node's machine that registers and sends heartbeats."""

from __future__ import annotations

import msgspec

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.errors import RemoteProtocolError
from kvrelay.machine.contract import Announce, CoreAction, Exit, Log, NodeState, Ready, Send
from kvrelay.machine.liveness import Liveness
from kvrelay.protocol.ids import ROUTER, PeerId, peer_name
from kvrelay.protocol.messages import router_to_node
from kvrelay.protocol.messages.base import Heartbeat, Load, Message
from kvrelay.protocol.messages.node_to_router import Drained, Leaving, Register
from kvrelay.protocol.messages.router_to_node import RegisterAgain, Registered, RegistrationRefused

REFUSED = "registration refused"
"""Reason of the Exit that follows a RegistrationRefused: the process ends with status 2 and is not restarted."""

READY: NodeState = "ready"
DRAINING: NodeState = "draining"


class Membership:
    """Sends Register until a router answers, then heartbeats. Registers again when a router asks for it.

    With a static registry there is one router, which the shell has connected to and calls ROUTER. It is never taken for
    lost; another start of it may take its place. With another registry the node announces itself and any number of
    routers connect to it, as ``router#incarnation``. One that sends nothing for the peer timeout is lost.
    """

    def __init__(self, registration: Register, node: NodeConfig) -> None:
        self._registration = registration
        self._is_static = node.registry.kind == "static"
        self._alive = Liveness(node.cluster.peer_timeout_s)
        self._registered: dict[PeerId, str] = {}
        """Routers we are registered with, and their incarnations."""
        self._last_incarnation: str | None = None
        self._joined = False
        self._leaving = False

    # ------------------------------------------------------------ who is there

    def is_router(self, peer: PeerId) -> bool:
        """Return whether ``peer`` has the name of a router. Any process that reaches the port can use it."""
        return peer == ROUTER if self._is_static else peer_name(peer) == ROUTER

    def is_authorized(self, peer: PeerId, message: Message) -> bool:
        """Return False if only routers may send ``message`` and ``peer`` is none that this node is registered with."""
        if type(message).__module__ != router_to_node.__name__:
            return True
        about_registration = isinstance(message, Registered | RegisterAgain | RegistrationRefused)
        known = self._is_static or about_registration or peer in self._registered
        return known and self.is_router(peer)

    # ------------------------------------------------------------ coming and staying

    def join(self) -> list[CoreAction]:
        """Ask to be registered: the node can serve."""
        self._joined = True
        return [Ready(), Send(ROUTER, self._registration) if self._is_static else Announce(READY)]

    def beat(self, load: Load) -> list[CoreAction]:
        """Send every router a heartbeat, or ask again to be registered."""
        if self._is_static and not self._registered:
            return self.join()
        return [Send(router, Heartbeat(load=load)) for router in self._registered]

    def heard(self, peer: PeerId, now: float) -> None:
        """Note that a router was heard."""
        self._alive.heard(peer, now)

    def _on_router_found(self, peer: PeerId) -> list[CoreAction]:
        """Register with a router that has connected to this node and does not know it yet."""
        if self._is_static or not self._joined or not self.is_router(peer) or peer in self._registered:
            return []
        return [Send(peer, self._registration)]

    def receive(self, peer: PeerId, message: Message, now: float) -> tuple[list[CoreAction], bool]:
        """Take one of a router's registration messages, or anybody's heartbeat.

        Returns what to do, and whether the router is another than ``peer`` was before: then nobody waits for what this
        node still holds for it. Raises RemoteProtocolError on any other message.
        """
        match message:
            case Heartbeat():
                return self._on_router_found(peer), False
            case Registered(router_incarnation=incarnation):
                return self._registered_with(peer, incarnation, now)
            case RegisterAgain():
                self._forget(peer)
                return [Send(peer, self._registration)], False
            case RegistrationRefused(reason=reason):
                return [Log("error", REFUSED, {"reason": reason}), Exit(REFUSED)], False
        raise RemoteProtocolError(f"unexpected {type(message).__name__} from the router")

    def _registered_with(self, peer: PeerId, incarnation: str, now: float) -> tuple[list[CoreAction], bool]:
        changed = self._is_static and self._last_incarnation not in (None, incarnation)
        self._registered[peer] = self._last_incarnation = incarnation
        actions: list[CoreAction] = [Log("info", "registered", {"router": incarnation})]
        if not self._is_static:
            self._alive.watch(peer, now)
            if self._leaving:
                actions.append(Send(peer, Leaving()))
        return actions, changed

    # ------------------------------------------------------------ losing routers

    def silent(self, now: float) -> list[PeerId]:
        """Return the routers not heard of for too long."""
        return self._alive.lost(now)

    def lost(self, router: PeerId) -> bool:
        """Take ``router`` for lost. The session then rises, which tells it later that its requests were dropped.

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

    # ------------------------------------------------------------ going

    def leave(self) -> list[CoreAction]:
        """Tell all routers that the node takes no new requests."""
        self._leaving = True
        announced: list[CoreAction] = [Announce(DRAINING)] if self._joined and not self._is_static else []
        return [*announced, *(Send(router, Leaving()) for router in self._routers())]

    def drained(self) -> list[CoreAction]:
        """Tell all routers that the node holds no request any more."""
        return [Send(router, Drained()) for router in self._routers()]

    def _routers(self) -> list[PeerId]:
        return [ROUTER] if self._is_static else list(self._registered)
