"""Deadlines, borrowed memory and failures, on a backend that does what the test says."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from storage_rooms import GEOMETRY, HASHES, HandClock, planes, views
from support.loops import run

from kvrelay.errors import StorageUnavailableError
from kvstore.storage.block_format import BlockFormat, Value
from kvstore.storage.calls import Delivery, GetCall, Loan, PutCall
from kvstore.storage.interface import PutOutcome, StoreStats, VerifyReport
from kvstore.storage.none import NoBackend
from kvstore.storage.store import PAUSE_S, Store

SOON_S = 0.05
"""Deadline of calls that are meant to miss it."""


class Scripted(NoBackend):
    """Does as told, and in every call blocks a thread until ``go``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.go = threading.Event()
        self.started, self.done = asyncio.Event(), asyncio.Event()
        self.results: list[object] = []
        self.first_blocks = 0
        """Blocks of a call that are done before it blocks."""
        self.error: Exception | None = None

    async def put(self, call: PutCall) -> None:
        staging: Value = np.empty(BlockFormat(GEOMETRY).value_bytes, np.uint8)

        def work(index: int) -> None:
            packed = call.pack(index, staging)
            self.results.append(packed)
            if packed:
                call.outcomes[index] = PutOutcome.WRITTEN

        await self._work(len(call.block_hashes), work)

    async def get(self, call: GetCall) -> None:
        kv = BlockFormat(GEOMETRY)
        values = [packed(kv, block_hash, index) for index, block_hash in enumerate(call.block_hashes)]
        await self._work(len(values), lambda index: self.results.append(call.deliver(index, values[index])))

    async def stats(self) -> StoreStats:
        await self._work(1, lambda index: None)
        return StoreStats("scripted", 0, 0, 0)

    async def _work(self, num_blocks: int, work: Callable[[int], None]) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error
        for index in range(self.first_blocks):
            work(index)

        loop = asyncio.get_running_loop()

        def rest() -> None:
            self.go.wait()
            for index in range(self.first_blocks, num_blocks):
                work(index)
            loop.call_soon_threadsafe(self.done.set)

        threading.Thread(target=rest).start()
        self.started.set()
        await self.done.wait()


def packed(kv: BlockFormat, block_hash: bytes, index: int) -> Value:
    """Return the good value of ``planes(...)`` block ``index``."""
    value = np.empty(kv.value_bytes, np.uint8)
    kv.payload(value)[...] = planes(8)[:, :, index]
    kv.seal(value, block_hash)
    return value


def scripted(timeout_s: float = 10.0) -> tuple[Store, Scripted, HandClock]:
    backend, clock = Scripted(), HandClock()
    return Store(backend, GEOMETRY, timeout_s, clock), backend, clock


class SlowDisk(NoBackend):
    """The system gives up a read, as those of network file systems."""

    async def verify(self) -> VerifyReport:
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")


async def let_go(backend: Scripted) -> None:
    """Let the thread go on that a call left behind, and wait for it."""
    backend.go.set()
    await backend.done.wait()


# ---------------------------------------------------------------- deadlines


def test_a_time_out_of_the_system_is_an_error_of_the_store_without_a_deadline_too() -> None:
    store = Store(SlowDisk(), GEOMETRY, 10.0, HandClock())
    with pytest.raises(StorageUnavailableError, match="did not answer in time"):
        run(store.verify())


def test_a_get_ends_at_its_deadline_and_nothing_is_written_afterwards() -> None:
    async def check() -> None:
        store, backend, _ = scripted(SOON_S)
        pool = planes(2, None)
        assert await store.get(HASHES[:2], views(pool)) == [False, False]
        assert store.counters.timeouts == 1
        await let_go(backend)
        assert backend.results == [Delivery.LATE] * 2
        assert not pool.any()

    run(check())


def test_a_put_ends_at_its_deadline_and_nothing_is_read_afterwards() -> None:
    async def check() -> None:
        store, backend, _ = scripted(SOON_S)
        assert await store.put(HASHES[:2], views(planes(2))) == [PutOutcome.FAILED] * 2
        await let_go(backend)
        assert backend.results == [False, False]
        assert store.counters.failed_blocks == 2

    run(check())


def test_what_was_done_before_the_deadline_counts() -> None:
    async def check() -> None:
        store, backend, _ = scripted(SOON_S)
        backend.first_blocks = 2
        pool = planes(8, None)
        assert await store.get(HASHES[:8], views(pool)) == [True] * 2 + [False] * 6
        await let_go(backend)
        backend.go.clear()
        backend.done.clear()
        outcomes = await store.put(HASHES[:3], views(planes(3)))
        assert outcomes == [PutOutcome.WRITTEN] * 2 + [PutOutcome.FAILED]
        await let_go(backend)
        assert outcomes[2] is PutOutcome.FAILED
        assert (pool[:, :, :2] == planes(8)[:, :, :2]).all()
        assert not pool[:, :, 2:].any()
        assert (store.counters.timeouts, store.counters.skipped) == (2, 0)

    run(check())


def test_a_cancelled_call_gives_the_memory_back_too() -> None:
    async def check() -> None:
        store, backend, _ = scripted()
        pool = planes(2, None)
        call = asyncio.ensure_future(store.get(HASHES[:2], views(pool)))
        await backend.started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await let_go(backend)
        assert backend.results == [Delivery.LATE] * 2
        assert not pool.any()

    run(check())


def test_a_loan_ends_after_the_copies_that_run() -> None:
    async def check() -> None:
        loop, loan, inside, leave = asyncio.get_running_loop(), Loan(), asyncio.Semaphore(0), threading.Event()

        def copy() -> None:
            with loan.use() as lent:
                assert lent
                loop.call_soon_threadsafe(inside.release)
                leave.wait()

        threads = [threading.Thread(target=copy) for _ in range(2)]
        for thread in threads:
            thread.start()
            await inside.acquire()
        end = asyncio.ensure_future(loan.end())
        await asyncio.sleep(0)
        with loan.use() as lent:
            assert not lent
        assert not end.done()
        leave.set()
        await end
        for thread in threads:
            thread.join()

    run(check())


# ---------------------------------------------------------------- failures


def test_a_failing_backend_is_left_alone_for_a_while() -> None:
    async def check() -> None:
        store, backend, clock = scripted()
        backend.go.set()
        backend.error = StorageUnavailableError("down")
        assert await store.get(HASHES[:1], views(planes(1))) == [False]
        assert await store.put(HASHES[:1], views(planes(1))) == [PutOutcome.FAILED]
        assert await store.longest_prefix(HASHES[:1]) == 0
        assert await store.delete(HASHES[:1]) == 0
        assert backend.calls == 1
        assert (store.counters.errors, store.counters.skipped) == (1, 3)
        backend.error = None
        clock.now_s += PAUSE_S
        assert await store.get(HASHES[:1], views(planes(1))) == [True]

    run(check())


def test_a_backend_that_does_not_answer_is_left_alone_too() -> None:
    async def check() -> None:
        store, backend, _ = scripted(SOON_S)
        await store.get(HASHES[:1], views(planes(1)))
        await store.get(HASHES[:1], views(planes(1)))
        assert (backend.calls, store.counters.timeouts, store.counters.skipped) == (1, 1, 1)
        await let_go(backend)

    run(check())


def test_a_failure_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        store, backend, clock = scripted()
        backend.go.set()
        for error in (
            StorageUnavailableError("down"),
            StorageUnavailableError("down"),
            None,
            StorageUnavailableError("x"),
        ):
            backend.error = error
            await store.get(HASHES[:1], views(planes(1)))
            clock.now_s += PAUSE_S

    run(check())
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "KV storage fails, going on without: down",
        "KV storage fails, going on without: x",
    ]


def test_operators_are_told() -> None:
    async def check() -> None:
        store, backend, _ = scripted()
        backend.error = StorageUnavailableError("down")
        with pytest.raises(StorageUnavailableError, match="down"):
            await store.stats()
        backend.error = None
        backend.go.set()
        assert (await store.stats()).backend == "scripted"

    run(check())


def test_longest_prefix_stops_asking_at_the_first_gap() -> None:
    class Counting(NoBackend):
        asked = 0

        async def contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
            self.asked += len(block_hashes)
            return [block_hash in HASHES[:300] for block_hash in block_hashes]

    async def check() -> None:
        backend = Counting()
        assert await Store(backend, GEOMETRY, 10.0, HandClock()).longest_prefix(HASHES) == 300
        assert backend.asked < 600

    run(check())
