"""How fast something has been done lately."""

from __future__ import annotations

import math

_MEMORY_S = 10.0
"""Seconds after which a measurement has 1/e of its weight."""

_STALE_S = 60.0
"""Seconds after which measurements count no more, so that what was slow is tried again."""


class Speed:
    """Units per second: what was done lately divided by the time it took. None: not measured, or too long ago.

    A sum divided by a sum, so that many small measurements do not count more than the time they took.
    """

    __slots__ = ("_amount", "_measured_s", "_seconds")

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0
        self._measured_s = -math.inf

    def add(self, amount: float, seconds: float, now: float) -> None:
        """Note that ``amount`` units took ``seconds``."""
        kept = math.exp(-max(0.0, now - self._measured_s) / _MEMORY_S) if self.at(now) is not None else 0.0
        self._amount = kept * self._amount + amount
        self._seconds = kept * self._seconds + max(seconds, 1e-6)
        self._measured_s = now

    def at(self, now: float) -> float | None:
        """Return units per second as measured up to ``now``."""
        return self._amount / self._seconds if now - self._measured_s < _STALE_S else None
