"""What is on its way between a node's pool and its store, in either direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, cast

from kvrelay.config.sections import StorageConfig
from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, LoadKV, StoreCounted
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import Attempt, BlockId
from kvstore.offload.kv_offloader import KVOffloader

T = TypeVar("T")


class StoreTransfers(Generic[T]):
    """Starts reads for attempts at requests, takes the ends of reads and saves, and counts both.

    One object for each node's machine, beside its ``offloader``, which is told what reads say of the store. What is
    read is for a T of the caller's.
    """

    def __init__(self, config: StorageConfig, block_size: int, offloader: KVOffloader, outbox: Outbox) -> None:
        self.min_blocks = min_read_blocks(config, block_size)
        self._offloader = offloader
        self._outbox = outbox
        self._reads: dict[Attempt, tuple[T, Sequence[bytes], float]] = {}
        self._counters = {"kv_loads": 0.0, "kv_blocks_loaded": 0.0, "kv_blocks_not_loaded": 0.0}
        self._store_counters: dict[str, float] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way to or from the store."""
        return not len(self._offloader) and not self._reads

    @property
    def counters(self) -> dict[str, float]:
        """What was read and saved, and what the store itself has counted. They only grow."""
        return {**self._counters, **self._offloader.counters, **self._store_counters}

    def load(
        self, key: Attempt, owner: T, hashes: Sequence[bytes], blocks: Sequence[BlockId], timeout_s: float
    ) -> None:
        """Have ``blocks`` filled with the KV of ``hashes``; ``loaded`` must be called when that is over."""
        self._reads[key] = owner, hashes, self._outbox.now
        self._counters["kv_loads"] += 1
        self._outbox.do(LoadKV(key, hashes, blocks, self.min_blocks, timeout_s))

    def loaded(self, event: KVLoaded) -> tuple[T, float]:
        """Note what came of a read; return what it was for, and how many seconds it took."""
        owner, hashes, started_s = self._reads.pop(cast(Attempt, event.key))
        self._offloader.remember(hashes[: event.num_blocks])
        self._offloader.forget(hashes[event.num_blocks :])
        self._counters["kv_blocks_loaded"] += event.num_blocks
        self._counters["kv_blocks_not_loaded"] += len(hashes) - event.num_blocks
        return owner, self._outbox.now - started_s

    def take(self, event: KVStaged | KVStored | StoreCounted) -> None:
        """Take what concerns no single request."""
        match event:
            case KVStaged():
                self._offloader.staged(event)
            case KVStored():
                self._offloader.stored(event)
            case StoreCounted(counters=counters):
                self._store_counters = counters


def min_read_blocks(config: StorageConfig, block_size: int) -> int:
    """Return how many blocks are worth a read at least."""
    return -(-config.min_read_tokens // block_size)
