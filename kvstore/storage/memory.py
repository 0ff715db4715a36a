"""Backend ``memory``: values in this process's memory, with LRU eviction."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

import numpy as np

from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.block_format import BlockFormat, Value
from kvstore.storage.calls import Delivery, GetCall, PutCall
from kvstore.storage.interface import PutOutcome, StoreCounters, StoreStats, VerifyReport
from kvstore.storage.threads import BlockingThreads


class MemoryBackend:
    """At most ``capacity_bytes`` of values in slots of one array. The system allocates its memory on first write.

    A slot belongs to the free list, to the index, or to the thread that fills it. A slot being read is not reused: if
    it is evicted meanwhile, it becomes free after the read.
    """

    def __init__(self, geometry: KVGeometry, capacity_bytes: int, timeout_s: float) -> None:
        self.counters = StoreCounters()
        self._format = BlockFormat(geometry)
        self._timeout_s = timeout_s
        self._num_slots = capacity_bytes // self._format.value_bytes
        self._values: Value = np.empty((0, self._format.value_bytes), np.uint8)
        self._free: list[int] = []
        self._index: OrderedDict[bytes, int] = OrderedDict()
        self._slot_read: int | None = None
        self._mutex = threading.Lock()
        self._threads = BlockingThreads("kv-memory")

    async def open(self) -> None:
        """Reserve address space for all slots."""
        self._values = np.empty((self._num_slots, self._format.value_bytes), np.uint8)
        self._free = list(range(self._num_slots - 1, -1, -1))

    async def put(self, call: PutCall) -> None:
        """Pack blocks into free or least recently used slots."""
        await self._threads.write(lambda: self._put(call))

    async def get(self, call: GetCall) -> None:
        """Copy blocks out of their slots."""
        await self._threads.read(lambda: self._get(call))

    async def contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
        with self._mutex:
            return [block_hash in self._index for block_hash in block_hashes]

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        return sum([self._drop(block_hash) for block_hash in block_hashes])

    async def clear(self) -> int:
        return await self.delete(list(self._index))

    async def stats(self) -> StoreStats:
        num_blocks, value_bytes = len(self._index), self._format.value_bytes
        return StoreStats("memory", num_blocks, num_blocks * value_bytes, self._num_slots * value_bytes)

    async def verify(self) -> VerifyReport:
        return await self._threads.read(self._verify)

    async def close(self) -> None:
        await self._threads.close(self._timeout_s)
        self._index.clear()
        self._free.clear()
        self._values = self._values[:0].copy()

    # ------------------------------------------------------------ in the threads

    def _put(self, call: PutCall) -> None:
        own = frozenset(call.block_hashes)
        self._touch(call.block_hashes)
        for index, block_hash in enumerate(call.block_hashes):
            if call.loan.ended:
                return
            if block_hash in self._index:
                call.outcomes[index] = PutOutcome.PRESENT
            elif (slot := self._take_slot(own)) is not None:
                packed = call.pack(index, self._values[slot])
                self._give_slot(slot, block_hash if packed else None)
                call.outcomes[index] = PutOutcome.WRITTEN if packed else PutOutcome.FAILED
        self._touch(call.block_hashes)

    def _get(self, call: GetCall) -> None:
        for index, block_hash in enumerate(call.block_hashes):
            if call.loan.ended:
                return
            with self._reading(block_hash) as value:
                delivery = Delivery.LATE if value is None else call.deliver(index, value)
            if delivery is Delivery.BAD:
                self.counters.corrupt_blocks += self._drop(block_hash)
        self._touch(call.block_hashes)

    def _verify(self) -> VerifyReport:
        block_hashes, num_corrupt = list(self._index), 0
        for block_hash in block_hashes:
            with self._reading(block_hash) as value:
                good = value is None or self._format.is_good(value, block_hash)
            num_corrupt += not good and self._drop(block_hash)
        return VerifyReport(len(block_hashes), num_corrupt)

    def _touch(self, block_hashes: Sequence[bytes]) -> None:
        """Make these most recently used, the first block most of all, because the others need it."""
        with self._mutex:
            for block_hash in reversed(block_hashes):
                if block_hash in self._index:
                    self._index.move_to_end(block_hash)

    def _take_slot(self, keep: Set[bytes]) -> int | None:
        """Return a free slot, evicting the least recently used block if needed; None if all blocks are in ``keep``."""
        with self._mutex:
            if self._free:
                return self._free.pop()
            for block_hash, slot in self._index.items():
                if block_hash in keep:
                    return None
                if slot != self._slot_read:
                    del self._index[block_hash]
                    self.counters.evicted_blocks += 1
                    return slot
        return None

    def _give_slot(self, slot: int, block_hash: bytes | None) -> None:
        """Register ``slot`` as ``block_hash``, or free it."""
        with self._mutex:
            if block_hash is None or block_hash in self._index:
                self._free.append(slot)
            else:
                self._index[block_hash] = slot

    def _drop(self, block_hash: bytes) -> bool:
        with self._mutex:
            slot = self._index.pop(block_hash, None)
            if slot is not None and slot != self._slot_read:
                self._free.append(slot)
            return slot is not None

    @contextmanager
    def _reading(self, block_hash: bytes) -> Iterator[Value | None]:
        """Return a context with the value of ``block_hash``, or None. Its slot is not reused meanwhile."""
        with self._mutex:
            slot = self._slot_read = self._index.get(block_hash)
        try:
            yield None if slot is None else self._values[slot]
        finally:
            with self._mutex:
                self._slot_read = None
                if slot is not None and self._index.get(block_hash) != slot:
                    self._free.append(slot)
