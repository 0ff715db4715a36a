"""The store used by nodes: a backend with deadlines, counters, and a pause after failures."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from kvrelay.errors import LocalProtocolError, StorageUnavailableError
from kvrelay.machine.clock import Clock
from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.backend import Backend
from kvstore.storage.block_format import BlockFormat
from kvstore.storage.calls import GetCall, PutCall, require_hashes
from kvstore.storage.interface import BlockView, PutOutcome, StoreCounters, StoreStats, VerifyReport

T = TypeVar("T")

PAUSE_S = 1.0
"""Seconds without calls to the backend after a failure, so that not every request waits for a dead server."""

_PREFIX_STEP = 256

logger = logging.getLogger(__name__)


class Store:
    """KVStore on top of ``backend``. Every call to the backend ends after ``timeout_s`` at the latest.

    ``delay`` is awaited at the beginning of each call, within its deadline: a backend made slow on purpose.
    """

    def __init__(
        self,
        backend: Backend,
        geometry: KVGeometry,
        timeout_s: float,
        clock: Clock,
        delay: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._backend = backend
        self._format = BlockFormat(geometry)
        self._timeout_s = timeout_s
        self._clock = clock
        self._delay = delay
        self._paused_until = 0.0
        self._failing = False
        self._closed = False

    @property
    def counters(self) -> StoreCounters:
        return self._backend.counters

    async def open(self) -> None:
        try:
            await self._backend.open()
        except BaseException:
            await self.close()
            raise

    async def put(self, block_hashes: Sequence[bytes], blocks: Sequence[BlockView]) -> list[PutOutcome]:
        call = PutCall(self._format, block_hashes, blocks)
        if block_hashes and self._may_try():
            try:
                await self._try(lambda: self._backend.put(call), lambda: PutOutcome.WRITTEN in call.outcomes)
            finally:
                await call.loan.end()
        outcomes = list(call.outcomes)
        self._count_put(outcomes)
        return outcomes

    async def get(
        self, block_hashes: Sequence[bytes], blocks: Sequence[BlockView], timeout_s: float | None = None
    ) -> list[bool]:
        call = GetCall(self._format, block_hashes, blocks)
        if block_hashes and self._may_try():
            try:
                await self._try(lambda: self._backend.get(call), lambda: True in call.hits, timeout_s)
            finally:
                await call.loan.end()
        hits, counters = sum(call.hits), self.counters
        counters.hit_blocks += hits
        counters.missed_blocks += len(call.hits) - hits
        counters.read_bytes += hits * self._format.payload_bytes
        return call.hits

    async def longest_prefix(self, block_hashes: Sequence[bytes], timeout_s: float | None = None) -> int:
        require_hashes(block_hashes)
        found = 0

        async def search() -> None:
            nonlocal found
            for start in range(0, len(block_hashes), _PREFIX_STEP):
                present = await self._backend.contains(block_hashes[start : start + _PREFIX_STEP])
                found += present.index(False) if False in present else len(present)
                if not all(present):
                    return

        if block_hashes and self._may_try():
            await self._try(search, lambda: found > 0, timeout_s)
        return found

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        require_hashes(block_hashes)
        if not block_hashes or not self._may_try():
            return 0
        return await self._try(lambda: self._backend.delete(block_hashes), lambda: False) or 0

    async def clear(self) -> int:
        return await self._insist(self._backend.clear, self._timeout_s)

    async def stats(self) -> StoreStats:
        return await self._insist(self._backend.stats, self._timeout_s)

    async def verify(self) -> VerifyReport:
        return await self._insist(self._backend.verify, None)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._backend.close()

    # ------------------------------------------------------------ around the backend

    def _may_try(self) -> bool:
        self._require_open()
        if self._clock.now() >= self._paused_until:
            return True
        self.counters.skipped += 1
        return False

    async def _try(
        self,
        operation: Callable[[], Awaitable[T]],
        made_progress: Callable[[], bool],
        timeout_s: float | None = None,
    ) -> T | None:
        """Await ``operation`` until the deadline; None if it failed or timed out. Results recorded so far are kept."""
        timeout_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                if self._delay is not None:
                    await self._delay()
                result = await operation()
            self._failing = False
            return result
        except TimeoutError:
            self.counters.timeouts += 1
            if not made_progress():
                self._pause(f"no answer within {timeout_s:.3g} s")
        except StorageUnavailableError as error:
            self.counters.errors += 1
            self._pause(error.message)
        return None

    def _pause(self, reason: str) -> None:
        self._paused_until = self._clock.now() + PAUSE_S
        # Logged as a warning once, because calls are retried after each pause.
        logger.log(
            logging.DEBUG if self._failing else logging.WARNING, "KV storage fails, going on without: %s", reason
        )
        self._failing = True

    async def _insist(self, operation: Callable[[], Awaitable[T]], timeout_s: float | None) -> T:
        self._require_open()
        try:
            async with asyncio.timeout(timeout_s):
                return await operation()
        except TimeoutError as error:  # without a deadline it is one of the system's, such as of a network file system
            limit = "in time" if timeout_s is None else f"within {timeout_s:.3g} s"
            raise StorageUnavailableError(f"KV storage did not answer {limit}") from error

    def _require_open(self) -> None:
        if self._closed:
            raise LocalProtocolError("the KV store is closed")

    def _count_put(self, outcomes: list[PutOutcome]) -> None:
        totals, counters = Counter(outcomes), self.counters
        counters.written_blocks += totals[PutOutcome.WRITTEN]
        counters.present_blocks += totals[PutOutcome.PRESENT]
        counters.failed_blocks += totals[PutOutcome.FAILED]
        counters.written_bytes += totals[PutOutcome.WRITTEN] * self._format.payload_bytes
