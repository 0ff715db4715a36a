"""Time slices on the event loop for long work, so that other tasks run in between."""

from __future__ import annotations

import asyncio
import time

MAX_TURN_S = 0.005


class Turn:
    """One task's time slice on the loop. A task begins a new one after it has awaited something."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a new time slice."""
        self._ends_s = time.monotonic() + MAX_TURN_S

    async def pause(self) -> None:
        """Yield to the loop if the time slice of ``MAX_TURN_S`` is over."""
        if time.monotonic() >= self._ends_s:
            await asyncio.sleep(0)
            self.begin()
