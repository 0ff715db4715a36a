"""A node's standing with its router: the part of a node's machine that registers and heartbeats."""

from __future__ import annotations

from kvrelay.core.errors import RemoteProtocolError
from kvrelay.core.ids import ROUTER
from kvrelay.core.machine import CoreAction, Exit, Log, Send
from kvrelay.core.messages.base import Heartbeat, Load, Message
from kvrelay.core.messages.node_to_router import Register
from kvrelay.core.messages.router_to_node import RegisterAgain, Registered, RegistrationRefused

REFUSED = "registration refused"
"""Reason of the Exit that follows a RegistrationRefused: the process ends with status 2 and is not restarted."""


class Membership:
    """Registers until the router answers, then heartbeats. A router that lost track of us is told again."""

    def __init__(self, registration: Register) -> None:
        self._registration = registration
        self._registered = False
        self._router_incarnation: str | None = None

    def join(self) -> list[CoreAction]:
        """Ask to be registered; the shell has connected to the router."""
        return [Send(ROUTER, self._registration)]

    def beat(self, load: Load) -> list[CoreAction]:
        """Show a sign of life, or ask again to be registered."""
        if not self._registered:
            return self.join()
        return [Send(ROUTER, Heartbeat(load=load))]

    def receive(self, message: Message) -> tuple[list[CoreAction], bool]:
        """Take one of the router's registration messages.

        Returns what to do, and whether the router is another than before: then nobody waits for what this node still
        holds. Raises RemoteProtocolError on any other message.
        """
        match message:
            case Registered(router_incarnation=incarnation):
                changed = self._router_incarnation not in (None, incarnation)
                self._registered, self._router_incarnation = True, incarnation
                return [Log("info", "registered", {"router": incarnation})], changed
            case RegisterAgain():
                self._registered = False
                return self.join(), False
            case RegistrationRefused(reason=reason):
                return [Log("error", REFUSED, {"reason": reason}), Exit(REFUSED)], False
        raise RemoteProtocolError(f"unexpected {type(message).__name__} from the router")
