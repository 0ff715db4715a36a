"""Memory of attempts that have ended."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from kvrelay.protocol.ids import Attempt

T = TypeVar("T")


class Recent(Generic[T]):
    """How the last ``limit`` attempts ended. Messages about them that were sent earlier may still arrive."""

    def __init__(self, limit: int = 8192) -> None:
        self._limit = limit
        self._endings: OrderedDict[Attempt, T] = OrderedDict()

    def note(self, attempt: Attempt, ending: T) -> None:
        """Remember ``ending`` and, if there are too many, forget the oldest."""
        self._endings[attempt] = ending
        self._endings.move_to_end(attempt)
        if len(self._endings) > self._limit:
            self._endings.popitem(last=False)

    def forget(self, attempt: Attempt) -> None:
        """Forget ``attempt``; it need not be known."""
        self._endings.pop(attempt, None)

    def get(self, attempt: Attempt) -> T | None:
        """Return how ``attempt`` ended, or None if that is not known (any more)."""
        return self._endings.get(attempt)
