"""From the pool to the store, without anybody waiting: which blocks are on their way, and which are there already."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvrelay.config.sections import StorageConfig
from kvrelay.machine.contract import KVStaged, KVStored, StageKV, StoreKV
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache

_MOST_REMEMBERED = 1 << 16
"""Blocks known to be stored that a node remembers, 100 bytes each."""

_REMEMBERED_S = 60.0
"""For so long: the store may lose them without a word, to its limits or to its end."""

_MOST_SLOTS = 1 << 16
"""Blocks of staging memory, however small they are."""

OnSaved = Callable[[int], None]
"""Gets how many of the first blocks given to ``save`` are in the store."""


@dataclass(slots=True)
class _Save:
    hashes: Sequence[bytes]
    """Those being written; ``first`` blocks before them are stored already."""
    first: int
    blocks: list[BlockId]
    slots: list[int]
    on_saved: OnSaved


class KVOffloader:
    """Copies published blocks to the node's staging memory, then has them written from there.

    A block is held for the copy only, milliseconds; how slow the store is concerns nobody but the staging memory, which
    is bounded: when it is full, blocks are not saved. One object for each node's machine; ``counters`` only grow.
    """

    def __init__(self, config: StorageConfig, block_bytes: int, kv: KVCache, outbox: Outbox) -> None:
        self._kv = kv
        self._outbox = outbox
        num_slots = num_staging_slots(config, block_bytes)
        self._saves_nothing = num_slots == 0
        self._free_slots = list(range(num_slots))
        self._saves: dict[int, _Save] = {}
        self._number = 0
        self._stored: OrderedDict[bytes, float] = OrderedDict()
        """Until when a block need not be written again."""
        self._block_bytes = block_bytes
        self._num_staging = 0
        self.counters = {"kv_blocks_saved": 0.0, "kv_bytes_saved": 0.0, "kv_blocks_not_saved": 0.0}

    def __len__(self) -> int:
        """Saves under way."""
        return len(self._saves)

    @property
    def is_staging(self) -> bool:
        """Whether blocks are held for a copy: they will be free in a moment."""
        return self._num_staging > 0

    def save(self, hashes: Sequence[bytes], on_saved: OnSaved) -> None:
        """Save the published blocks of ``hashes`` that the store lacks, as far as the staging memory goes.

        ``on_saved`` is called once: at once if there is nothing to write.
        """
        if self._saves_nothing:
            on_saved(0)
            return
        blocks = self._kv.match(hashes)
        first = self._num_known(hashes)
        last = min(len(blocks), first + len(self._free_slots))
        self.counters["kv_blocks_not_saved"] += max(0, len(hashes) - max(first, last))
        if last <= first:
            on_saved(first)
            return
        count = last - first
        slots, self._free_slots = self._free_slots[-count:], self._free_slots[:-count]
        save = _Save(hashes[first:last], first, blocks[first:last], slots, on_saved)
        self._kv.pin(save.blocks)
        self._number += 1
        self._saves[self._number] = save
        self._num_staging += 1
        for block_hash in save.hashes:  # on its way: nobody else need write it
            self._remember(block_hash)
        self._outbox.do(StageKV(self._number, save.blocks, save.slots))

    def staged(self, event: KVStaged) -> None:
        """Let the blocks go, and have their copies written."""
        assert isinstance(event.key, int)
        save = self._saves[event.key]
        self._num_staging -= 1
        self._kv.unpin(save.blocks)
        if event.copied:
            self._outbox.do(StoreKV(event.key, save.hashes, save.slots))
        else:
            self.stored(KVStored(event.key, 0, 0))

    def stored(self, event: KVStored) -> None:
        """Note what became of a save."""
        assert isinstance(event.key, int)
        save = self._saves.pop(event.key)
        self._free_slots += save.slots
        self.forget(save.hashes[event.num_blocks :])
        self.counters["kv_blocks_saved"] += event.num_written
        self.counters["kv_bytes_saved"] += event.num_written * self._block_bytes
        self.counters["kv_blocks_not_saved"] += len(save.hashes) - event.num_blocks
        save.on_saved(save.first + event.num_blocks)

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
