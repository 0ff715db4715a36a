"""Reads from a node's store into its pool, and the events of reads and saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, cast

from kvrelay.config.storage import StorageConfig
from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, LoadKV, StoreCounted
from kvrelay.machine.laws import Laws, Violation
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import Attempt, BlockId
from kvstore.offload.kv_offloader import KVOffloader, Saved

T = TypeVar("T")
U = TypeVar("U")


class StoreTransfers(Generic[T, U]):
    """Starts reads for attempts at requests, takes the answers of reads and saves, and counts both.

    One object for each node's machine, beside its ``offloader``, which learns from each read what the store has. What
    is read is for a T of the caller's, what is saved for a U.
    """

    def __init__(self, config: StorageConfig, block_size: int, offloader: KVOffloader[U], outbox: Outbox) -> None:
        self.min_blocks = min_read_blocks(config, block_size)
        self._offloader = offloader
        self._outbox = outbox
        self._reads: dict[Attempt, tuple[T, Sequence[bytes], float]] = {}
        self._counters = {"kv_loads": 0.0, "kv_blocks_loaded": 0.0, "kv_blocks_not_loaded": 0.0}
        self._store_counters: dict[str, float] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no save and no read is under way."""
        return not len(self._offloader) and not self._reads

    def laws_at_rest(self) -> Laws:
        """Check that no transfer is under way and all staging memory is free; see ``kvrelay.machine.laws``."""
        if not self.is_idle:
            yield [Violation("transfers with the store are not over")]
        yield from self._offloader.laws()

    @property
    def counters(self) -> dict[str, float]:
        """What was read and saved, and what the store itself has counted. They only grow."""
        return {**self._counters, **self._offloader.counters, **self._store_counters}

    def load(
        self, key: Attempt, owner: T, hashes: Sequence[bytes], blocks: Sequence[BlockId], timeout_s: float
    ) -> None:
        """Have the store read the KV of ``hashes`` into ``blocks``; ``loaded`` must be called with the answer."""
        self._reads[key] = owner, hashes, self._outbox.now
        self._counters["kv_loads"] += 1
        self._outbox.do(LoadKV(key, hashes, blocks, self.min_blocks, timeout_s))

    def loaded(self, event: KVLoaded) -> tuple[T, float]:
        """Note how much was read; return what it was for, and how many seconds it took."""
        owner, hashes, started_s = self._reads.pop(cast(Attempt, event.key))
        self._offloader.remember(hashes[: event.num_blocks])
        self._offloader.forget(hashes[event.num_blocks :])
        self._counters["kv_blocks_loaded"] += event.num_blocks
        self._counters["kv_blocks_not_loaded"] += len(hashes) - event.num_blocks
        return owner, self._outbox.now - started_s

    def take(self, event: KVStaged | KVStored | StoreCounted) -> Saved[U] | None:
        """Take an answer of a save, or the store's counters; return Saved if a save is over with it."""
        match event:
            case KVStaged():
                return self._offloader.staged(event)
            case KVStored():
                return self._offloader.stored(event)
            case StoreCounted(counters=counters):
                self._store_counters = counters
                return None


def min_read_blocks(config: StorageConfig, block_size: int) -> int:
    """Return how many blocks are worth a read at least."""
    return -(-config.min_read_tokens // block_size)
