"""Saves KV blocks of the pool to the store: which blocks are being saved, and which the store has already."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from kvrelay.config.storage import StorageConfig
from kvrelay.machine.contract import KVStaged, KVStored, StageKV, StoreKV
from kvrelay.machine.laws import Laws, Violation
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache

_MOST_REMEMBERED = 1 << 16
"""Blocks known to be stored that a node remembers, 100 bytes each."""

_REMEMBERED_S = 60.0
"""Seconds after which a block is written again: stores evict and lose blocks without telling the node."""

_MOST_SLOTS = 1 << 16
"""Most blocks of staging memory, however small they are."""

T = TypeVar("T")


class Saved(NamedTuple, Generic[T]):
    """A save is over: of the blocks given to ``save`` with ``owner``, the first ``num_blocks`` are in the store."""

    owner: T
    num_blocks: int


@dataclass(slots=True)
class _Save(Generic[T]):
    hashes: Sequence[bytes]
    """Those being written; ``first`` blocks before them are stored already."""
    first: int
    blocks: list[BlockId]
    slots: list[int]
    owner: T


class KVOffloader(Generic[T]):
    """Copies published blocks to the node's staging memory, then has them written from there.

    A save is StageKV, its answer KVStaged, StoreKV, its answer KVStored. Blocks are pinned for the copy only,
    milliseconds. The staging memory is bounded: blocks that find no room in it are not saved. What is saved is for a T
    of the caller's, which comes back with Saved. One object for each node's machine; ``counters`` only grow.
    """

    def __init__(self, config: StorageConfig, block_bytes: int, kv: KVCache, outbox: Outbox) -> None:
        self._kv = kv
        self._outbox = outbox
        num_slots = num_staging_slots(config, block_bytes)
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))
        self._saves: dict[int, _Save[T]] = {}
        self._number = 0
        self._stored: OrderedDict[bytes, float] = OrderedDict()
        """Hash of each block known to be stored: the time in seconds until which it is not written again."""
        self._block_bytes = block_bytes
        self._num_staging = 0
        self.counters = {"kv_blocks_saved": 0.0, "kv_bytes_saved": 0.0, "kv_blocks_not_saved": 0.0}

    def __len__(self) -> int:
        """Saves under way."""
        return len(self._saves)

    def laws(self) -> Laws:
        """Check that each slot of the staging memory is free, or of one save; see ``kvrelay.machine.laws``."""
        in_use = [slot for save in self._saves.values() for slot in save.slots]
        slots = [*self._free_slots, *in_use]
        if len(slots) != self._num_slots or len(set(slots)) != self._num_slots:
            text = f"{len(self._free_slots)} free staging slots and {len(in_use)} in use are not all {self._num_slots}"
            yield [Violation(text)]

    @property
    def is_staging(self) -> bool:
        """Whether blocks are pinned for a copy: they will be free in milliseconds."""
        return self._num_staging > 0

    def save(self, hashes: Sequence[bytes], owner: T) -> Saved[T] | None:
        """Save the published blocks of ``hashes`` that the store lacks, as far as the staging memory goes.

        Returns Saved if there is nothing to write. Otherwise ``staged`` or ``stored`` returns it later, once.
        """
        if not self._num_slots:
            return Saved(owner, 0)
        blocks = self._kv.match(hashes)
        first = self._num_known(hashes)
        last = min(len(blocks), first + len(self._free_slots))
        self.counters["kv_blocks_not_saved"] += max(0, len(hashes) - max(first, last))
        if last <= first:
            return Saved(owner, first)
        count = last - first
        slots, self._free_slots = self._free_slots[-count:], self._free_slots[:-count]
        save = _Save(hashes[first:last], first, blocks[first:last], slots, owner)
        self._kv.pin(save.blocks)
        self._number += 1
        self._saves[self._number] = save
        self._num_staging += 1
        for block_hash in save.hashes:  # so that no other save writes it
            self._remember(block_hash)
        self._outbox.do(StageKV(self._number, save.blocks, save.slots))
        return None

    def staged(self, event: KVStaged) -> Saved[T] | None:
        """Unpin the blocks and have their copies written; if they were not copied, the save is over."""
        assert isinstance(event.key, int)
        save = self._saves[event.key]
        self._num_staging -= 1
        self._kv.unpin(save.blocks)
        if not event.copied:
            return self.stored(KVStored(event.key, 0, 0))
        self._outbox.do(StoreKV(event.key, save.hashes, save.slots))
        return None

    def stored(self, event: KVStored) -> Saved[T]:
        """Note which blocks were written; the save is over."""
        assert isinstance(event.key, int)
        save = self._saves.pop(event.key)
        self._free_slots += save.slots
        self.forget(save.hashes[event.num_blocks :])
        self.counters["kv_blocks_saved"] += event.num_written
        self.counters["kv_bytes_saved"] += event.num_written * self._block_bytes
        self.counters["kv_blocks_not_saved"] += len(save.hashes) - event.num_blocks
        return Saved(save.owner, save.first + event.num_blocks)

    def remember(self, hashes: Sequence[bytes]) -> None:
        """Note blocks that the store has, because they were just read from it."""
        for block_hash in hashes:
            self._remember(block_hash)

    def forget(self, hashes: Sequence[bytes]) -> None:
        """Note blocks that the store turned out not to have."""
        for block_hash in hashes:
            self._stored.pop(block_hash, None)

    def _remember(self, block_hash: bytes) -> None:
        self._stored[block_hash] = self._outbox.now + _REMEMBERED_S
        self._stored.move_to_end(block_hash)
        if len(self._stored) > _MOST_REMEMBERED:
            self._stored.popitem(last=False)

    def _num_known(self, hashes: Sequence[bytes]) -> int:
        for count, block_hash in enumerate(hashes):
            if self._stored.get(block_hash, -math.inf) <= self._outbox.now:
                return count
        return len(hashes)


def num_staging_slots(config: StorageConfig, block_bytes: int) -> int:
    """Return how many blocks the staging memory of a node holds: none without a store to write to."""
    if config.backend == "none" or config.write_policy == "off":
        return 0
    return min(_MOST_SLOTS, max(1, config.staging // block_bytes))
