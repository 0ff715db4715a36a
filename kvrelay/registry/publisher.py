"""Keeps a node's entry in the registry. Runs on the shell's loop, so a long step does not let its lease expire."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable

from kvrelay.config.sections import RegistryConfig
from kvrelay.errors import RegistryError
from kvrelay.machine.contract import Announce
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.registry.node_entry import NodeEntry
from kvrelay.registry.registry import Registry, open_registry

_RENEWALS = 4
"""Renewals per lease, so that some may fail."""

_MAX_RETRY_S = 1.0

logger = logging.getLogger(__name__)


class Publisher:
    """Writes the last announced entry of one node to the registry, repeatedly."""

    def __init__(self, registry: Registry, registration: Register, lease_s: float) -> None:
        self._registry = registry
        self._registration = registration
        self._renewal_s = lease_s / _RENEWALS
        self._retry_s = min(_MAX_RETRY_S, self._renewal_s)
        self._started_s = time.time()
        self._entry: NodeEntry | None = None
        self._changed = asyncio.Event()
        self._stopping = False
        self._failing = False

    def announce(self, action: Announce) -> None:
        """Publish the node with the state of ``action`` from now on."""
        self._entry = NodeEntry(registration=self._registration, state=action.state, started_s=self._started_s)
        self._changed.set()

    async def run(self) -> None:
        """Publish until told to stop."""
        await self._changed.wait()
        while not self._stopping:
            self._changed.clear()
            wait_s = self._renewal_s if await self._publish() else self._retry_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    def stop(self) -> None:
        """Stop publishing. Cancelling the task is not enough, because redis-py may suppress it."""
        self._stopping = True
        self._changed.set()

    async def withdraw(self) -> None:
        """Remove the entry if the registry can be reached. Else its lease expires."""
        if self._entry is not None:
            with contextlib.suppress(RegistryError):
                await self._registry.withdraw(self._entry.peer)

    async def _publish(self) -> bool:
        if self._entry is None:
            return True
        try:
            await self._registry.publish(self._entry)
        except RegistryError as error:
            if not self._failing:  # said once: it is tried again and again
                logger.warning("registry lost, known routers are still served: %s", error.message)
            self._failing = True
            return False
        if self._failing:
            logger.info("registry available again")
        self._failing = False
        return True


@contextlib.asynccontextmanager
async def announcing(config: RegistryConfig, registration: Register) -> AsyncIterator[Callable[[Announce], None]]:
    """Return a context with the handler of Announce actions; its end removes the entry. Raises ConfigError."""
    registry = open_registry(config)
    publisher = Publisher(registry, registration, config.lease_s)
    task = asyncio.create_task(publisher.run())
    try:
        yield publisher.announce
    finally:
        publisher.stop()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await publisher.withdraw()
        await registry.close()
