"""The index of the ``file`` backend: maps blocks to slots. Shared by all processes, consistent at any instant.

The file contains the layout, then ``num_sets`` sets of ``ways`` entries::

    entry = block hash 32s | generation u64 | last used, ns since 1970, u64 | 16 spare      slot = set * ways + way

A block's set is computed from its hash, so a lookup is one read without a lock. An entry is

- free: all zero;
- reserved: no hash, a generation; a writer fills the slot, and lookups do not find it;
- published: a hash and the generation of that writer.

Entries change only under the index's lock, one at a time, each by one small write. No invariant spans two entries.
Therefore a process may die at any point: the kernel releases its lock, and its reservations expire after
``reservation_s``. A torn entry may point to a slot with other content; the digest in every value detects that. Only
``last used`` is written without the lock, because any value of it is harmless.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvrelay.protocol.block_hash import HASH_BYTES
from kvstore.storage.file_layout import ENTRY_BYTES, SETS_OFFSET, Layout
from kvstore.storage.file_lock import FileLock
from kvstore.storage.interface import StoreCounters

_WORDS = ENTRY_BYTES // 8
_GENERATION_WORD = HASH_BYTES // 8
_USED_WORD = _GENERATION_WORD + 1
_USED_OFFSET = _USED_WORD * 8
_FREE_ENTRY = bytes(ENTRY_BYTES)
_NO_HASH = bytes(HASH_BYTES)
_WORD = np.dtype("<u8")
_NEVER = np.iinfo(np.uint64).max

MAX_CLOCK_STEP_NS = 3_600_000_000_000
"""An entry with a time of use further in the future than this is invalid and is evicted first."""

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a block: the slot with its entry, and the generation of its content."""

    slot: int
    generation: int


class FileIndex:
    """The index in the file ``fd``. Methods block for microseconds per block. Called from any thread."""

    def __init__(
        self, fd: int, layout: Layout, counters: StoreCounters, lock_timeout_s: float, reservation_s: float
    ) -> None:
        self.layout = layout
        self._counters = counters
        self._fd = fd
        self._lock = FileLock(fd, lock_timeout_s)
        self._reservation_ns = int(reservation_s * 1e9)
        self._generations = itertools.count(secrets.randbits(62) + 1)
        """Starts at a random number, so that writers on a host use different generations."""

    # ------------------------------------------------------------ without the lock

    def find(self, block_hash: bytes) -> Place | None:
        """Return the place where ``block_hash`` is published, or None."""
        first = self._first_slot(block_hash)
        return self._find_in(first, self._read_set(first), block_hash)

    @staticmethod
    def _find_in(first: int, data: bytes, block_hash: bytes) -> Place | None:
        at = data.find(block_hash)
        while at >= 0:
            if at % ENTRY_BYTES == 0:
                return Place(
                    first + at // ENTRY_BYTES, int.from_bytes(data[at + HASH_BYTES : at + _USED_OFFSET], "little")
                )
            at = data.find(block_hash, at + 1)
        return None

    def still(self, block_hash: bytes, place: Place) -> bool:
        """Whether ``place`` still holds ``block_hash`` in the same generation."""
        offset = self._offset(place.slot)
        return os.pread(self._fd, _USED_OFFSET, offset) == _identity(block_hash, place.generation)

    def touch(self, place: Place, used_ns: int) -> None:
        """Set the time of last use, for eviction."""
        os.pwrite(self._fd, used_ns.to_bytes(8, "little"), self._offset(place.slot) + _USED_OFFSET)

    def published(self) -> Iterator[tuple[bytes, Place]]:
        """Scan all sets; yield each block and its place."""
        for number in range(self.layout.num_sets):
            first = number * self.layout.ways
            data = self._read_set(first)
            for at in range(0, len(data), ENTRY_BYTES):
                block_hash = data[at : at + HASH_BYTES]
                if any(block_hash):
                    generation = int.from_bytes(data[at + HASH_BYTES : at + _USED_OFFSET], "little")
                    yield block_hash, Place(first + at // ENTRY_BYTES, generation)

    def count(self) -> int:
        """Return the number of published blocks."""
        return sum(1 for _ in self.published())

    # ------------------------------------------------------------ under the lock

    def reserve(self, block_hashes: Sequence[bytes], keep: Set[bytes], now_ns: int) -> list[Place | None]:
        """Reserve one slot per block, evicting the least recently used; None where no slot can be reserved.

        Blocks in ``keep`` and slots being filled are not evicted.
        """
        with self._lock.held():
            return [self._reserve(block_hash, keep, now_ns) for block_hash in block_hashes]

    def publish(self, filled: Sequence[tuple[bytes, Place]], used_ns: Sequence[int]) -> list[bool]:
        """Publish blocks whose slots are filled; False where the reservation was lost."""
        with self._lock.held():
            return [
                self._publish(block_hash, place, used)
                for (block_hash, place), used in zip(filled, used_ns, strict=True)
            ]

    def release(self, places: Sequence[Place]) -> None:
        """Free these reservations."""
        if not places:
            return
        with self._lock.held():
            for place in places:
                if self.still(_NO_HASH, place):
                    os.pwrite(self._fd, _FREE_ENTRY, self._offset(place.slot))

    def remove(self, block_hash: bytes, place: Place) -> bool:
        """Remove ``block_hash`` if it is still at ``place``; return whether it was."""
        with self._lock.held():
            found = self.still(block_hash, place)
            if found:
                os.pwrite(self._fd, _FREE_ENTRY, self._offset(place.slot))
            return found

    def clear(self) -> int:
        """Remove all blocks and reservations; return the number of blocks."""
        with self._lock.held():
            num_blocks = self.count()
            for number in range(self.layout.num_sets):
                os.pwrite(self._fd, bytes(self.layout.set_bytes), self._offset(number * self.layout.ways))
            return num_blocks

    def _reserve(self, block_hash: bytes, keep: Set[bytes], now_ns: int) -> Place | None:
        first = self._first_slot(block_hash)
        words = np.frombuffer(self._read_set(first), _WORD).reshape(-1, _WORDS)
        way = self._victim(words, keep, now_ns)
        if way is None:
            return None
        self._counters.evicted_blocks += bool(words[way, :_GENERATION_WORD].any())
        place = Place(first + way, next(self._generations))
        os.pwrite(self._fd, _entry(_NO_HASH, place.generation, now_ns), self._offset(place.slot))
        return place

    def _victim(self, words: Words, keep: Set[bytes], now_ns: int) -> int | None:
        """Return the way to use next: a free one, a dead writer's, or the least recently used; None if all are kept."""
        used = words[:, _USED_WORD]
        way = int(used.argmin())
        if not used[way]:  # free
            return way
        used = used.copy()
        used[used > now_ns + MAX_CLOCK_STEP_NS] = 1
        reserved = ~words[:, :_GENERATION_WORD].any(axis=1)
        alive = reserved & (used + np.uint64(self._reservation_ns) > now_ns)
        used[reserved] = 0
        used[alive & (words[:, _GENERATION_WORD] != 0)] = _NEVER
        for _ in range(len(used)):
            way = int(used.argmin())
            if used[way] == _NEVER:
                break
            if words[way, :_GENERATION_WORD].tobytes() not in keep:
                return way
            used[way] = _NEVER
        return None

    def _publish(self, block_hash: bytes, place: Place, used_ns: int) -> bool:
        first = self._first_slot(block_hash)
        data, at = self._read_set(first), (place.slot - first) * ENTRY_BYTES
        if data[at : at + _USED_OFFSET] != _identity(_NO_HASH, place.generation):
            return False
        twin = self._find_in(first, data, block_hash)  # another process stored the same block first
        published = _FREE_ENTRY if twin else _entry(block_hash, place.generation, used_ns)
        os.pwrite(self._fd, published, self._offset(place.slot))
        return True

    # ------------------------------------------------------------ encoding

    def _first_slot(self, block_hash: bytes) -> int:
        """Return the first slot of the set ``block_hash`` belongs to."""
        return int.from_bytes(block_hash[:8], "little") % self.layout.num_sets * self.layout.ways

    def _read_set(self, first: int) -> bytes:
        """Return the entries of the set whose first slot is ``first``; entries missing in a truncated file are free."""
        return os.pread(self._fd, self.layout.set_bytes, self._offset(first)).ljust(self.layout.set_bytes, b"\0")

    @staticmethod
    def _offset(slot: int) -> int:
        return SETS_OFFSET + slot * ENTRY_BYTES


def _identity(block_hash: bytes, generation: int) -> bytes:
    return block_hash + generation.to_bytes(8, "little")


def _entry(block_hash: bytes, generation: int, used_ns: int) -> bytes:
    return (_identity(block_hash, generation) + used_ns.to_bytes(8, "little")).ljust(ENTRY_BYTES, b"\0")
