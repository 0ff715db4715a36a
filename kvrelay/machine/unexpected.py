"""Messages that a machine does not take, or not from this sender: all roles drop, count and log them alike."""

from __future__ import annotations

from typing import Any

from kvrelay.machine.contract import Log
from kvrelay.machine.log_limit import LogLimit
from kvrelay.machine.outbox import RoleOutbox
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message

COUNTER = "unexpected_messages"
"""Name of the counter in a role's metrics."""


class UnexpectedMessages:
    """Counts them in ``count``, which only grows, and logs the first of each sender and kind in each minute.

    The sender gets no answer: it may be of a later version, and an answer would end its connection.
    """

    def __init__(self, outbox: RoleOutbox[Any]) -> None:
        self.count = 0
        self._outbox = outbox
        self._log_limit = LogLimit()

    def take(self, peer: PeerId, message: Message) -> None:
        """Count ``message`` from ``peer``, and log it if it is the first of its kind in this interval."""
        self.count += 1
        if self._log_limit.permits((peer, type(message)), self._outbox.now):
            fields: dict[str, object] = {"peer": peer, "message": type(message).__name__, COUNTER: self.count}
            self._outbox.do(Log("warning", "unexpected message", fields))
