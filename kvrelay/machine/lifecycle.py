"""Status fields that only change along a table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, TypeVar

from kvrelay.errors import LocalProtocolError

S = TypeVar("S", bound=StrEnum)

Table = Mapping[S, frozenset[S]]
"""For each status, those that may follow it. A status without followers is terminal."""


class Lifecycle(Generic[S]):
    """The one status of one thing, and the history of how it came there: (status, time) pairs, oldest first."""

    __slots__ = ("_name", "_table", "history", "status")

    def __init__(self, name: str, table: Table[S], first: S, now: float) -> None:
        self._name = name
        self._table = table
        self.status = first
        self.history: list[tuple[S, float]] = [(first, now)]

    def move(self, to: S, now: float) -> None:
        """Change the status. Raises LocalProtocolError with the history if the table has no such step."""
        if to not in self._table[self.status]:
            history = " -> ".join(status for status, _ in self.history)
            raise LocalProtocolError(f"{self._name}: {history} -> {to} is not a legal step")
        self.status = to
        self.history.append((to, now))
