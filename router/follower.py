"""Polls the registry for the router's machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from kvrelay.config.sections import RegistryConfig
from kvrelay.errors import RegistryError
from kvrelay.registry.registry import Registry, open_registry
from router.events import NodesFound, RegistryLost

logger = logging.getLogger(__name__)


class Follower:
    """Posts NodesFound every ``interval_s``, and RegistryLost once when the registry cannot be read."""

    def __init__(self, registry: Registry, post: Callable[[object], None], interval_s: float) -> None:
        self._registry = registry
        self._post = post
        self._interval_s = interval_s
        self._failing = False
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Read the registry every ``interval_s`` until ``stop``."""
        while not self._stopping.is_set():
            await self._read()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._stopping.wait()

    def stop(self) -> None:
        """Stop reading. Cancelling is not enough because redis-py may swallow the cancellation."""
        self._stopping.set()

    async def _read(self) -> None:
        try:
            entries = await self._registry.entries()
        except RegistryError as error:
            if not self._failing:
                logger.warning("registry lost, going on with the nodes known: %s", error.message)
                self._post(RegistryLost(error.message))
            self._failing = True
            return
        if self._failing:
            logger.info("registry is back")
        self._failing = False
        self._post(NodesFound(tuple(entries)))


@contextlib.asynccontextmanager
async def following(config: RegistryConfig, post: Callable[[object], None], interval_s: float) -> AsyncIterator[None]:
    """Follow the registry until the context ends. Raises ConfigError for an invalid URL."""
    registry = open_registry(config)
    follower = Follower(registry, post, interval_s)
    task = asyncio.create_task(follower.run())
    try:
        yield
    finally:
        follower.stop()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await registry.close()
