"""What is being read from the store and saved to it, and what was learnt of it."""

from __future__ import annotations

from typing import Any

import pytest
from support.ids import block_ids

from kvrelay.config.storage import StorageConfig
from kvrelay.machine.contract import KVLoaded, KVStaged, LoadKV, StoreCounted
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.ids import Attempt, RequestId
from kvstore.blocks.kv_cache import KVCache
from kvstore.offload.kv_offloader import KVOffloader, Saved
from kvstore.offload.store_transfers import StoreTransfers

HASHES = BlockHasher("model", 1).hashes(range(8))
KEY = Attempt(RequestId("r"), 1)


class Desk:
    """StoreTransfers that reads two blocks at least, and the offloader beside it."""

    def __init__(self) -> None:
        config = StorageConfig(backend="file", min_read_tokens=5)
        self.outbox = Outbox()
        self.kv = KVCache(16)
        self.offloader: KVOffloader[str] = KVOffloader(config, 64, self.kv, self.outbox)
        self.transfers: StoreTransfers[str, str] = StoreTransfers(config, 4, self.offloader, self.outbox)

    def load(self, num_blocks: int) -> LoadKV:
        self.transfers.load(KEY, "what", HASHES[:num_blocks], block_ids(*range(num_blocks)), 3.0)
        [action] = self.outbox.take()
        assert isinstance(action, LoadKV)
        return action

    def publish(self, num_blocks: int) -> None:
        blocks = self.kv.allocate(num_blocks)
        self.kv.publish(HASHES[:num_blocks], blocks)
        self.kv.unpin(blocks)

    def save(self, num_blocks: int) -> list[Any]:
        assert self.offloader.save(HASHES[:num_blocks], "whose") is None
        return self.outbox.take()


def test_a_read_is_worth_so_many_blocks_and_comes_back_with_what_it_was_for() -> None:
    harness = Desk()
    assert harness.transfers.min_blocks == 2
    assert harness.load(5) == LoadKV(KEY, HASHES[:5], block_ids(*range(5)), 2, 3.0)
    was_idle = harness.transfers.is_idle
    harness.outbox.now += 0.5
    assert harness.transfers.loaded(KVLoaded(KEY, 3)) == ("what", 0.5)
    assert (was_idle, harness.transfers.is_idle) == (False, True)
    assert harness.transfers.counters == {
        "kv_loads": 1.0,
        "kv_blocks_loaded": 3.0,
        "kv_blocks_not_loaded": 2.0,
        **harness.offloader.counters,
    }


@pytest.mark.parametrize("num_known", [0, 5])
def test_what_was_read_is_known_to_be_stored_and_the_rest_to_be_missing(num_known: int) -> None:
    harness = Desk()
    harness.publish(5)
    harness.offloader.remember(HASHES[:num_known])
    harness.load(5)
    harness.transfers.loaded(KVLoaded(KEY, 3))
    [stage] = harness.save(5)
    assert len(stage.blocks) == 2


def test_it_is_not_idle_while_anything_is_on_its_way_to_the_store() -> None:
    harness = Desk()
    harness.publish(2)
    [stage] = harness.save(2)
    was_idle = harness.transfers.is_idle
    assert harness.transfers.take(KVStaged(stage.key, copied=False)) == Saved("whose", 0)
    assert (was_idle, harness.transfers.is_idle) == (False, True)


def test_what_the_store_counts_is_told_with_the_rest() -> None:
    harness = Desk()
    harness.transfers.take(StoreCounted({"store_hit_blocks": 5.0}))
    assert harness.transfers.counters["store_hit_blocks"] == 5.0
    assert harness.transfers.counters["kv_loads"] == 0.0
