"""What is on its way to the store, and what is there: staging memory as a bound, blocks held for the copy only."""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.core.config_sections import StorageConfig
from kvrelay.core.machine import KVStaged, KVStored, StageKV, StoreKV
from kvrelay.core.outbox import Outbox
from kvstore.block_hash import BlockHasher
from kvstore.kv_cache import KVCache
from kvstore.saver import Saver, num_staging_slots

BLOCK_BYTES = 1 << 14
SLOTS = 4
HASHES = BlockHasher("model", 1).hashes(range(16))


class Desk:
    """A saver with four staging slots and a pool in which the first blocks of HASHES are published."""

    def __init__(self, num_published: int = 8, **config: Any) -> None:
        self.kv = KVCache(16)
        blocks = self.kv.allocate(num_published)
        self.kv.publish(HASHES[:num_published], blocks)
        self.kv.unpin(blocks)
        self.blocks = blocks
        self.outbox = Outbox()
        storage = StorageConfig(**{"backend": "file", "staging": SLOTS * BLOCK_BYTES, **config})
        self.saver = Saver(storage, BLOCK_BYTES, self.kv, self.outbox)
        self.saved: list[int] = []

    def save(self, num_blocks: int) -> list[Any]:
        self.saver.save(HASHES[:num_blocks], self.saved.append)
        return self.outbox.take()

    def through(self, stage: StageKV, num_stored: int) -> None:
        """Let a save come to its end."""
        self.saver.staged(KVStaged(stage.key))
        [store] = self.outbox.take()
        assert isinstance(store, StoreKV)
        assert list(store.slots) == list(stage.slots)
        self.saver.stored(KVStored(stage.key, num_stored, num_stored))


def test_blocks_are_held_for_the_copy_only_and_slots_until_they_are_written() -> None:
    desk = Desk()
    [stage] = desk.save(3)
    assert stage.blocks == desk.blocks[:3]
    assert (desk.kv.num_referenced, desk.saver.is_staging) == (3, True)
    desk.saver.staged(KVStaged(stage.key))
    assert desk.kv.num_referenced == 0
    assert not desk.saver.is_staging
    [store] = desk.outbox.take()
    assert isinstance(store, StoreKV)
    assert store.hashes == HASHES[:3]
    assert len(desk.saver) == 1
    [other] = desk.save(8)
    assert not set(other.slots) & set(store.slots)
    desk.saver.stored(KVStored(stage.key, 3, 3))
    assert desk.saved == [3]
    assert desk.saver.counters["kv_bytes_saved"] == 3 * BLOCK_BYTES


def test_what_staging_memory_has_no_room_for_is_not_saved() -> None:
    desk = Desk()
    [stage] = desk.save(8)
    assert len(stage.blocks) == SLOTS
    assert desk.saver.counters["kv_blocks_not_saved"] == 4
    assert not desk.save(8)
    assert desk.saved == [4]  # those before it are on their way; none of its own could be
    desk.through(stage, 4)
    assert desk.saved == [4, 4]


def test_only_what_the_store_lacks_is_written() -> None:
    desk = Desk()
    [stage] = desk.save(3)
    desk.through(stage, 3)
    assert not desk.save(3)
    assert desk.saved == [3, 3]
    [more] = desk.save(5)
    assert more.blocks == desk.blocks[3:5]
    desk.through(more, 2)
    assert desk.saved == [3, 3, 5]


@pytest.mark.parametrize("num_stored", [0, 1])
def test_what_could_not_be_written_is_tried_again(num_stored: int) -> None:
    desk = Desk()
    [stage] = desk.save(3)
    desk.through(stage, num_stored)
    assert desk.saved == [num_stored]
    [again] = desk.save(3)
    assert again.blocks == desk.blocks[num_stored:3]


def test_what_the_store_lost_is_written_again() -> None:
    desk = Desk()
    [stage] = desk.save(3)
    desk.through(stage, 3)
    desk.saver.forget(HASHES[1:3])
    [again] = desk.save(3)
    assert again.blocks == desk.blocks[1:3]


def test_what_was_stored_long_ago_is_offered_again() -> None:
    """A store that came back empty must not stay without the beginnings of all that follows."""
    desk = Desk()
    [stage] = desk.save(3)
    desk.through(stage, 3)
    desk.outbox.now += 59.0
    assert not desk.save(3)
    desk.outbox.now += 1.0
    [again] = desk.save(3)
    assert again.blocks == desk.blocks[:3]
    desk.through(again, 3)
    assert not desk.save(3)


def test_what_was_read_from_the_store_is_not_written_to_it() -> None:
    desk = Desk()
    desk.saver.remember(HASHES[:2])
    [stage] = desk.save(3)
    assert stage.blocks == desk.blocks[2:3]


def test_a_copy_that_broke_is_not_written() -> None:
    desk = Desk()
    [stage] = desk.save(3)
    desk.saver.staged(KVStaged(stage.key, copied=False))
    assert not desk.outbox.take()
    assert desk.saved == [0]
    assert desk.kv.num_referenced == 0
    assert len(desk.save(8)[0].blocks) == SLOTS


def test_blocks_that_are_not_in_the_pool_any_more_are_not_saved() -> None:
    desk = Desk(num_published=2)
    [stage] = desk.save(5)
    assert stage.blocks == desk.blocks
    assert desk.saver.counters["kv_blocks_not_saved"] == 3


@pytest.mark.parametrize("config", [{"backend": "none"}, {"write_policy": "off"}])
def test_without_a_store_to_write_to_there_is_no_staging_memory(config: dict[str, Any]) -> None:
    desk = Desk(**config)
    desk.saver.remember(HASHES[:2])
    assert not desk.save(3)
    assert desk.saved == [0]
    assert not any(desk.saver.counters.values())


def test_staging_memory_has_room_for_a_block_however_large() -> None:
    assert num_staging_slots(StorageConfig(backend="file", staging=1 << 16), 1 << 30) == 1
