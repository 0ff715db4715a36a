"""Streams, events and graphs of a CPU, on which work is done when the call returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class InOrder:
    """A stream and an event. All waits are no-ops."""

    def record(self, stream: Any) -> None:
        """See Event."""

    def synchronize(self) -> None:
        """See Event and Stream."""


class DoneAgain(Generic[T]):
    """A graph where there is none: a replay does the work again."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.output = work()

    def replay(self) -> None:
        """See Graph."""
        self.output = self._work()
