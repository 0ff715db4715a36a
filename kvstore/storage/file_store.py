"""Backend ``file``: values in preallocated slabs in a directory shared by all processes of a host."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvrelay.errors import StorageError
from kvrelay.machine.clock import Clock
from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.block_format import BlockFormat, Value
from kvstore.storage.calls import Delivery, GetCall, PutCall
from kvstore.storage.file_directory import FileDirectory
from kvstore.storage.file_index import FileIndex, Place
from kvstore.storage.file_layout import Layout
from kvstore.storage.file_slabs import FileSlabs
from kvstore.storage.interface import PutOutcome, StoreCounters, StoreStats, VerifyReport
from kvstore.storage.threads import BlockingThreads

_BATCH_BLOCKS = 16
"""Blocks reserved and published under one lock."""

_RESERVATION_TIMEOUTS = 4
"""A reservation expires after this many put timeouts, because its writer must have died."""

logger = logging.getLogger(__name__)


class FileBackend:
    """At most ``capacity_bytes`` per geometry under ``path``, with LRU eviction.

    Safe if a process dies at any instant: a block is found only after it was written completely, and delivered only if
    its digest matches (see ``file_index``). ``as_is``: use the existing directory with its layout.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        path: Path,
        capacity_bytes: int,
        timeout_s: float,
        clock: Clock,
        *,
        as_is: bool = False,
    ) -> None:
        self.counters = StoreCounters()
        self._format = BlockFormat(geometry)
        self._path = path
        self._wanted = Layout.plan(self._format.namespace, self._format.value_bytes, capacity_bytes)
        self._timeout_s = timeout_s
        self._clock = clock
        self._as_is = as_is
        self._threads = BlockingThreads("kv-file")
        self._files: FileDirectory | None = None
        self._read_staging = _page_aligned(self._format.value_bytes)
        self._write_staging = _page_aligned(self._format.value_bytes)

    async def open(self) -> None:
        """Create or open the directory. Raises StorageError if that fails or the disk has no room."""
        await self._threads.write(self._open)

    def _open(self) -> None:
        if not self._wanted.num_slots:
            raise StorageError(f"storage.capacity has no room for one block of {self._wanted.slot_bytes} bytes")
        enter = FileDirectory.join if self._as_is else FileDirectory.open
        files = enter(self._path, self._wanted, self._timeout_s)
        try:
            self._slabs = FileSlabs.open(files.path, files.layout)
        except OSError as error:
            files.close()
            raise StorageError(f"cannot keep {files.layout.size_bytes} bytes of KV in {self._path}: {error}") from error
        reservation_s = _RESERVATION_TIMEOUTS * self._timeout_s
        self._index = FileIndex(files.index_fd, files.layout, self.counters, self._timeout_s, reservation_s)
        self._files = files

    async def put(self, call: PutCall) -> None:
        """Write the missing blocks to slots, batch by batch."""
        await self._threads.write(lambda: self._put(call))

    async def get(self, call: GetCall) -> None:
        """Read the slots of the stored blocks."""
        await self._threads.read(lambda: self._get(call))

    async def read_values(self, block_hashes: Sequence[bytes]) -> list[Value | None]:
        """Return the verified values of blocks, each in its own memory; None for missing blocks."""
        return await self._threads.read(lambda: [self._value(block_hash) for block_hash in block_hashes])

    async def contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
        return await self._threads.read(lambda: [self._index.find(one) is not None for one in block_hashes])

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        return await self._threads.write(lambda: sum([self._remove(one) for one in block_hashes]))

    async def clear(self) -> int:
        return await self._threads.write(self._index.clear)

    async def stats(self) -> StoreStats:
        layout = self._index.layout
        num_blocks = await self._threads.read(self._index.count)
        return StoreStats("file", num_blocks, num_blocks * layout.slot_bytes, layout.num_slots * layout.slot_bytes)

    async def verify(self) -> VerifyReport:
        return await self._threads.read(self._verify)

    async def close(self) -> None:
        """Close the files and keep their content."""
        ended = await self._threads.close(self._timeout_s)
        if self._files is not None and ended:  # never close a descriptor that a thread may still write to
            self._slabs.close()
            self._files.close()
        self._files = None

    def _now_ns(self) -> int:
        return int(self._clock.now() * 1e9)

    # ------------------------------------------------------------ in the writing thread

    def _put(self, call: PutCall) -> None:
        now_ns, own = self._now_ns(), frozenset(call.block_hashes)
        missing = []
        for index, block_hash in enumerate(call.block_hashes):
            if place := self._index.find(block_hash):
                self._index.touch(place, _used_ns(now_ns, call.block_hashes, index))
                call.outcomes[index] = PutOutcome.PRESENT
            else:
                missing.append(index)
        for start in range(0, len(missing), _BATCH_BLOCKS):
            if call.loan.ended:
                return
            self._put_batch(call, missing[start : start + _BATCH_BLOCKS], own, now_ns)

    def _put_batch(self, call: PutCall, indices: list[int], own: frozenset[bytes], now_ns: int) -> None:
        places = self._index.reserve([call.block_hashes[index] for index in indices], own, now_ns)
        reserved = [(index, place) for index, place in zip(indices, places, strict=True) if place is not None]
        filled: list[tuple[int, Place]] = []
        try:
            for index, place in reserved:
                if not (call.pack(index, self._write_staging) and self._slabs.write(place.slot, self._write_staging)):
                    break
                filled.append((index, place))
        except OSError as error:
            self.counters.errors += 1
            logger.warning("cannot write KV: %s", error)
        finally:
            self._index.release([place for _, place in reserved[len(filled) :]])
        blocks = [(call.block_hashes[index], place) for index, place in filled]
        used_ns = [_used_ns(now_ns, call.block_hashes, index) for index, _ in filled]
        for (index, _), published in zip(filled, self._index.publish(blocks, used_ns), strict=True):
            call.outcomes[index] = PutOutcome.WRITTEN if published else PutOutcome.FAILED

    def _remove(self, block_hash: bytes) -> bool:
        place = self._index.find(block_hash)
        return place is not None and self._index.remove(block_hash, place)

    # ------------------------------------------------------------ in the reading thread

    def _get(self, call: GetCall) -> None:
        now_ns = self._now_ns()
        for index, block_hash in enumerate(call.block_hashes):
            if call.loan.ended:
                return
            place = self._index.find(block_hash)
            if place is None:
                continue
            whole = self._read(place)
            delivery = call.deliver(index, self._read_staging) if whole else Delivery.BAD
            if delivery is Delivery.DONE:
                self._index.touch(place, _used_ns(now_ns, call.block_hashes, index))
            elif delivery is Delivery.BAD:
                self._drop_corrupt(block_hash, place)

    def _value(self, block_hash: bytes) -> Value | None:
        place = self._index.find(block_hash)
        if place is None:
            return None
        if self._read(place) and self._format.is_good(self._read_staging, block_hash):
            self._index.touch(place, self._now_ns())
            return self._read_staging.copy()
        self._drop_corrupt(block_hash, place)
        return None

    def _read(self, place: Place) -> bool:
        try:
            return self._slabs.read(place.slot, self._read_staging)
        except OSError as error:
            self.counters.errors += 1
            logger.warning("cannot read KV: %s", error)
            return False

    def _drop_corrupt(self, block_hash: bytes, place: Place) -> bool:
        """Remove a damaged block, unless its slot was reused for another block meanwhile."""
        corrupt = self._index.remove(block_hash, place)
        self.counters.corrupt_blocks += corrupt
        return corrupt

    def _verify(self) -> VerifyReport:
        num_blocks = num_corrupt = 0
        for block_hash, place in self._index.published():
            num_blocks += 1
            if not (self._read(place) and self._format.is_good(self._read_staging, block_hash)):
                num_corrupt += self._drop_corrupt(block_hash, place)
        return VerifyReport(num_blocks, num_corrupt)


def _page_aligned(size_bytes: int) -> Value:
    """Return page-aligned memory; the kernel copies to and from it a quarter faster."""
    return np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)


def _used_ns(now_ns: int, block_hashes: Sequence[bytes], index: int) -> int:
    """Return the time of use of block ``index``: latest for the first of a sequence, because the others need it."""
    return now_ns + len(block_hashes) - index
