"""Coroutines in plain tests, on the loop the processes run on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
import uvloop

from kvrelay.machine.contract import Received
from kvrelay.protocol.codec import decode

T = TypeVar("T")

PATIENCE_S = 60.0
"""What does not happen within this time will never happen."""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` to its end on a fresh uvloop."""

    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


class Inbox:
    """Collects delivered events and lets a test wait for the next.

    Those with the bytes of a message are compared with it, and returned without them.
    """

    def __init__(self) -> None:
        self._events: asyncio.Queue[object] = asyncio.Queue()

    def __call__(self, event: object) -> None:
        self._events.put_nowait(event)

    async def next(self) -> object:
        """Return the next event as soon as it is there."""
        event = await self._events.get()
        if isinstance(event, Received) and event.encoded:
            assert decode(event.encoded) == event.message
            return msgspec.structs.replace(event, encoded=b"")
        return event

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be taken."""
        return self._events.empty()
