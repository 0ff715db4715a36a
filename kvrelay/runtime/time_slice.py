"""Time slices on the event loop: long work is interrupted, so that other work runs in between."""

from __future__ import annotations

import asyncio
import time

MAX_TIME_SLICE_S = 0.005
"""Longest time that one task or callback uses the loop without a break, in seconds."""


class TimeSlice:
    """One task's time slice on the loop. A task begins a new one after it has awaited something."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a new time slice."""
        self._ends_s = time.monotonic() + MAX_TIME_SLICE_S

    async def pause(self) -> None:
        """Yield to the loop if the time slice of ``MAX_TIME_SLICE_S`` is over."""
        if time.monotonic() >= self._ends_s:
            await asyncio.sleep(0)
            self.begin()
