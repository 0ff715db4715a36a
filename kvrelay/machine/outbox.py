"""What the parts of one machine share while it handles an event."""

from __future__ import annotations

from typing import Generic, TypeAlias, TypeVar

from kvrelay.machine.contract import CoreAction, Send
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message

A = TypeVar("A")


class RoleOutbox(Generic[A]):
    """The time of the event that is handled, in seconds, and the actions it has led to so far, in order.

    ``A``: the actions that the role adds to the core ones. The machine sets ``now`` before it handles an event and
    takes the actions afterwards. Its parts read ``now`` here; data, such as a request, gets it as an argument.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._actions: list[CoreAction | A] = []

    def do(self, *actions: CoreAction | A) -> None:
        """Add ``actions``."""
        self._actions.extend(actions)

    def send(self, peer: PeerId, message: Message) -> None:
        """Add the action that sends ``message``."""
        self._actions.append(Send(peer, message))

    def take(self) -> list[CoreAction | A]:
        """Return the actions and begin anew."""
        actions, self._actions = self._actions, []
        return actions


Outbox: TypeAlias = RoleOutbox[CoreAction]
"""The outbox of a role without actions of its own."""
