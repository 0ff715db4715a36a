"""Performs the KV storage actions of a node's machine: copies to staging memory, store writes, store reads."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from itertools import takewhile
from types import TracebackType
from typing import Any, Self

import numpy as np

from kvrelay.config.faults import FaultsConfig
from kvrelay.kv_pool.interface import KVPool
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, LoadKV, StageKV, StoreCounted, StoreKV
from kvrelay.runtime.logging import log_event
from kvrelay.runtime.shell import Shell
from kvstore.storage.interface import KVStore, PutOutcome

logger = logging.getLogger(__name__)


def injected_delay(faults: FaultsConfig) -> Callable[[], Awaitable[None]] | None:
    """Return what makes some calls of a store late, as ``faults`` want it; None if they want none. Logs an error."""
    if not faults.store_delay_rate:
        return None
    fields = {"store_delay_rate": faults.store_delay_rate, "store_delay_s": faults.store_delay_s}
    log_event("error", "faults are injected on purpose", fields)
    rng = random.Random(faults.seed)

    async def delay() -> None:
        if rng.random() < faults.store_delay_rate:
            await asyncio.sleep(faults.store_delay_s)

    return delay


class StorageIO:
    """Moves blocks between one node's ``pool`` and its ``store``, with staging memory of ``num_slots`` blocks.

    ``async with`` opens the store; on exit it waits for pending calls and closes it.
    Every action is answered by its event, even on failure. All work runs on the loop or in its own threads and does not
    delay steps.
    """

    def __init__(
        self,
        store: KVStore,
        pool: KVPool,
        num_slots: int,
        post: Callable[[object], None],
        clock: Clock,
    ) -> None:
        self._store = store
        self._pool = pool
        self._post = post
        self._clock = clock
        # The system allocates these pages on first write, so an idle node uses no memory for them.
        geometry = pool.geometry
        self._staging = np.empty((num_slots, geometry.num_layers, 2, geometry.plane_block_bytes), np.uint8)
        self._copying = ThreadPoolExecutor(1, "kv-staging")
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self._store.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()
        self._copying.shutdown()

    def handle_with(self, shell: Shell) -> None:
        """Register this object as the handler of the KV storage actions of ``shell``."""
        for kind in (StageKV, StoreKV, LoadKV):
            shell.handle_with(kind, self.perform)

    def perform(self, action: StageKV | StoreKV | LoadKV) -> None:
        """Start ``action``. Called from the loop's thread."""
        match action:
            case StageKV():
                self._start(self._stage(action), KVStaged(action.key, copied=False))
            case StoreKV():
                self._start(self._put(action), KVStored(action.key, 0, 0))
            case LoadKV():
                self._start(self._get(action), KVLoaded(action.key, 0))

    def _start(self, work: Coroutine[Any, Any, object], if_it_breaks: object) -> None:
        async def run() -> None:
            try:
                event = await work
            except Exception:  # a store error costs only the stored blocks, not the node
                logger.exception("KV storage broke")
                event = if_it_breaks
            self._post(StoreCounted({f"store_{name}": float(n) for name, n in asdict(self._store.counters).items()}))
            self._post(event)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stage(self, action: StageKV) -> KVStaged:
        def copy() -> None:
            self._pool.copy_out(action.blocks, [self._staging[slot] for slot in action.slots])

        await asyncio.get_running_loop().run_in_executor(self._copying, copy)
        return KVStaged(action.key)

    async def _put(self, action: StoreKV) -> KVStored:
        outcomes = await self._store.put(action.hashes, [self._staging[slot] for slot in action.slots])
        num_first = sum(1 for _ in takewhile(lambda outcome: outcome is not PutOutcome.FAILED, outcomes))
        return KVStored(action.key, num_first, outcomes.count(PutOutcome.WRITTEN))

    async def _get(self, action: LoadKV) -> KVLoaded:
        deadline = self._clock.now() + action.timeout_s
        num_there = await self._store.longest_prefix(action.hashes, action.timeout_s)
        left_s = deadline - self._clock.now()
        if num_there < action.min_blocks or left_s <= 0:
            return KVLoaded(action.key, 0)
        loan = ExitStack()
        blocks = loan.enter_context(self._pool.lend(action.blocks[:num_there]))
        try:
            hits = await self._store.get(action.hashes[:num_there], blocks, left_s)
        finally:  # for a pool on a device, closing the loan copies the blocks to it
            await asyncio.get_running_loop().run_in_executor(self._copying, loan.close)
        return KVLoaded(action.key, sum(1 for _ in takewhile(bool, hits)))
