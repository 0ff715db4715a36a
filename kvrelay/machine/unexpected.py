"""Messages that a machine does not take, or not from this sender: all roles drop, count and log them alike."""

from __future__ import annotations

from typing import Any

from kvrelay.machine.contract import Log
from kvrelay.machine.outbox import RoleOutbox
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message

COUNTER = "unexpected_messages"
"""Name of the counter in a role's metrics."""

LOG_INTERVAL_S = 60.0
"""A sender and a kind of message are logged at most once in so many seconds."""

MAX_LOGGED = 100
"""Most log lines per interval: anybody may send anything, under as many names as it likes."""


class UnexpectedMessages:
    """Counts them in ``count``, which only grows, and logs the first of each sender and kind in each interval.

    The sender gets no answer: it may be of a later version, and an answer would end its connection.
    """

    def __init__(self, outbox: RoleOutbox[Any]) -> None:
        self.count = 0
        self._outbox = outbox
        self._logged: set[tuple[PeerId, type[Message]]] = set()
        self._interval_ends_s = 0.0

    def take(self, peer: PeerId, message: Message) -> None:
        """Count ``message`` from ``peer``, and log it if it is the first of its kind in this interval."""
        self.count += 1
        if self._outbox.now >= self._interval_ends_s:
            self._interval_ends_s = self._outbox.now + LOG_INTERVAL_S
            self._logged.clear()
        key = (peer, type(message))
        if key not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(key)
            fields: dict[str, object] = {"peer": peer, "message": type(message).__name__, COUNTER: self.count}
            self._outbox.do(Log("warning", "unexpected message", fields))
