"""A KV store in virtual time: one for a whole World, as slow, forgetful and full as a test wants it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, LoadKV, StageKV, StoreKV
from kvstore.offload.kv_offloader import num_staging_slots

if TYPE_CHECKING:
    from support.processes import NodeProcess

Blocks = npt.NDArray[np.uint8]


class FakeStore:
    """What all nodes of a World share. Times are in virtual seconds; whatever is not in time is not done."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.blocks: dict[bytes, Blocks] = {}
        self.stage_s = 0.0005
        self.call_s = 0.001
        self.block_s = 0.0002
        self.is_down = False
        self.capacity = 1 << 30
        self.losing = 0.0
        """Share of reads of a block that find nothing."""
        self.num_written = 0
        self.num_read = 0

    def put(self, hashes: Sequence[bytes], blocks: Sequence[Blocks], seconds: float) -> tuple[int, int]:
        """Return how many of the first are there in the end, and how many were written."""
        num_written = 0
        for place, (block_hash, block) in enumerate(zip(hashes, blocks, strict=True)):
            is_late = self.call_s + (place + 1) * self.block_s > seconds
            if self.is_down or is_late or (block_hash not in self.blocks and len(self.blocks) >= self.capacity):
                self.num_written += num_written
                return place, num_written
            num_written += block_hash not in self.blocks
            self.blocks.setdefault(block_hash, block.copy())
        self.num_written += num_written
        return len(hashes), num_written

    def get(self, hashes: Sequence[bytes], seconds: float) -> list[Blocks]:
        """Return the first blocks that are found in time."""
        found = []
        for place, block_hash in enumerate(hashes):
            is_late = self.call_s + (place + 1) * self.block_s > seconds
            if self.is_down or is_late or block_hash not in self.blocks or self.rng.random() < self.losing:
                break
            found.append(self.blocks[block_hash])
        self.num_read += len(found)
        return found

    def duration_s(self, num_blocks: int, limit_s: float) -> float:
        """Return how long a call for so many blocks takes."""
        return min(limit_s, self.call_s + num_blocks * self.block_s)


class FakeStorageIO:
    """Performs one node's storage actions. Blocks are read and written at the end of a copy or call, not before."""

    def __init__(self, node: NodeProcess, store: FakeStore) -> None:
        self._node = node
        self._store = store
        self._pool = node.engine.memory
        config = node.config.storage
        self._timeout_s = config.timeout_s
        geometry = node.engine.geometry
        num_slots = num_staging_slots(config, geometry.block_bytes)
        self._staging = np.zeros((num_slots, geometry.num_layers, 2, geometry.plane_block_bytes), np.uint8)
        node.handle_with(StageKV, self._stage)
        node.handle_with(StoreKV, self._put)
        node.handle_with(LoadKV, self._get)

    def _stage(self, action: StageKV) -> None:
        def copy() -> None:
            if self._node.alive:
                self._pool.copy_out(action.blocks, [self._staging[slot] for slot in action.slots])
                self._node.handle(KVStaged(action.key))

        self._node.world.after(self._store.stage_s, copy)

    def _put(self, action: StoreKV) -> None:
        def write() -> None:
            if self._node.alive:
                blocks = [self._staging[slot] for slot in action.slots]
                num_blocks, num_written = self._store.put(action.hashes, blocks, self._timeout_s)
                self._node.handle(KVStored(action.key, num_blocks, num_written))

        self._node.world.after(self._store.duration_s(len(action.hashes), self._timeout_s), write)

    def _get(self, action: LoadKV) -> None:
        def read() -> None:
            if self._node.alive:
                found = self._store.get(action.hashes, action.timeout_s)
                if len(found) < action.min_blocks:
                    found = []
                with self._pool.lend(action.blocks[: len(found)]) as blocks:
                    for block, content in zip(blocks, found, strict=True):
                        block[:] = content
                self._node.handle(KVLoaded(action.key, len(found)))

        self._node.world.after(self._store.duration_s(len(action.hashes), action.timeout_s), read)
