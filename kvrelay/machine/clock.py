"""Time as every role sees it."""

from __future__ import annotations

import time


class Clock:
    """Wall-clock seconds that never run backwards within a process.

    Anchored to the wall clock once and carried on by the monotonic clock, so times taken by processes of one host
    compare, and a step of the system's clock moves no deadline.
    """

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def now(self) -> float:
        """Return the time in seconds since 1970."""
        return time.monotonic() + self._offset_s
