"""Turns on the event loop, for work that may be long: others have the loop in between."""

from __future__ import annotations

import asyncio
import time

MAX_TURN_S = 0.005


class Turn:
    """One task's turn on the loop. A task that waited for something begins a new one."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a turn: others have just had the loop."""
        self._ends_s = time.monotonic() + MAX_TURN_S

    async def pause(self) -> None:
        """Let others have the loop if this turn has lasted as long as it may."""
        if time.monotonic() >= self._ends_s:
            await asyncio.sleep(0)
            self.begin()
