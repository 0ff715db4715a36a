"""What is being read from the store and saved to it, and what was learnt of it."""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.core.config_sections import StorageConfig
from kvrelay.core.ids import Attempt
from kvrelay.core.machine import KVLoaded, KVStaged, LoadKV, StoreCounted
from kvrelay.core.outbox import Outbox
from kvstore.block_hash import BlockHasher
from kvstore.kv_cache import KVCache
from kvstore.saver import Saver
from kvstore.traffic import Traffic

HASHES = BlockHasher("model", 1).hashes(range(8))
KEY = Attempt("r", 1)


class Desk:
    """Traffic that reads two blocks at least, and the saver beside it."""

    def __init__(self) -> None:
        config = StorageConfig(backend="file", min_read_tokens=5)
        self.outbox = Outbox()
        self.kv = KVCache(16)
        self.saver = Saver(config, 64, self.kv, self.outbox)
        self.traffic: Traffic[str] = Traffic(config, 4, self.saver, self.outbox)

    def load(self, num_blocks: int) -> LoadKV:
        self.traffic.load(KEY, "what", HASHES[:num_blocks], range(num_blocks), 3.0)
        [action] = self.outbox.take()
        assert isinstance(action, LoadKV)
        return action

    def publish(self, num_blocks: int) -> None:
        blocks = self.kv.allocate(num_blocks)
        self.kv.publish(HASHES[:num_blocks], blocks)
        self.kv.unpin(blocks)

    def save(self, num_blocks: int) -> list[Any]:
        self.saver.save(HASHES[:num_blocks], lambda _: None)
        return self.outbox.take()


def test_a_read_is_worth_so_many_blocks_and_comes_back_with_what_it_was_for() -> None:
    desk = Desk()
    assert desk.traffic.min_blocks == 2
    assert desk.load(5) == LoadKV(KEY, HASHES[:5], range(5), 2, 3.0)
    was_idle = desk.traffic.is_idle
    desk.outbox.now += 0.5
    assert desk.traffic.loaded(KVLoaded(KEY, 3)) == ("what", 0.5)
    assert (was_idle, desk.traffic.is_idle) == (False, True)
    assert desk.traffic.counters == {
        "kv_loads": 1.0,
        "kv_blocks_loaded": 3.0,
        "kv_blocks_not_loaded": 2.0,
        **desk.saver.counters,
    }


@pytest.mark.parametrize("num_known", [0, 5])
def test_what_was_read_is_known_to_be_stored_and_the_rest_to_be_missing(num_known: int) -> None:
    desk = Desk()
    desk.publish(5)
    desk.saver.remember(HASHES[:num_known])
    desk.load(5)
    desk.traffic.loaded(KVLoaded(KEY, 3))
    [stage] = desk.save(5)
    assert len(stage.blocks) == 2


def test_it_is_not_idle_while_anything_is_on_its_way_to_the_store() -> None:
    desk = Desk()
    desk.publish(2)
    [stage] = desk.save(2)
    was_idle = desk.traffic.is_idle
    desk.traffic.take(KVStaged(stage.key, copied=False))
    assert (was_idle, desk.traffic.is_idle) == (False, True)


def test_what_the_store_counts_is_told_with_the_rest() -> None:
    desk = Desk()
    desk.traffic.take(StoreCounted({"store_hit_blocks": 5.0}))
    assert desk.traffic.counters["store_hit_blocks"] == 5.0
    assert desk.traffic.counters["kv_loads"] == 0.0
