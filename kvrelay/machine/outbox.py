"""What the parts of one machine share while it handles an event."""

from __future__ import annotations

from kvrelay.machine.contract import CoreAction, Send
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message


class Outbox:
    """The time of the present event, and the actions it has led to so far, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._actions: list[CoreAction] = []

    def do(self, *actions: CoreAction) -> None:
        """Add ``actions``."""
        self._actions.extend(actions)

    def send(self, peer: PeerId, message: Message) -> None:
        """Add the action that sends ``message``."""
        self._actions.append(Send(peer, message))

    def take(self) -> list[CoreAction]:
        """Return the actions and begin anew."""
        actions, self._actions = self._actions, []
        return actions
