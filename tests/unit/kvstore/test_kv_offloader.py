"""What is on its way to the store, and what is there: staging memory as a bound, blocks held for the copy only."""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.config.storage import StorageConfig
from kvrelay.machine.contract import KVStaged, KVStored, StageKV, StoreKV
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.block_hash import BlockHasher
from kvstore.blocks.kv_cache import KVCache
from kvstore.offload.kv_offloader import KVOffloader, Saved, num_staging_slots

BLOCK_BYTES = 1 << 14
SLOTS = 4
HASHES = BlockHasher("model", 1).hashes(range(16))


class Desk:
    """A offloader with four staging slots and a pool in which the first blocks of HASHES are published."""

    def __init__(self, num_published: int = 8, **config: Any) -> None:
        self.kv = KVCache(16)
        blocks = self.kv.allocate(num_published)
        self.kv.publish(HASHES[:num_published], blocks)
        self.kv.unpin(blocks)
        self.blocks = blocks
        self.outbox = Outbox()
        storage = StorageConfig(**{"backend": "file", "staging": SLOTS * BLOCK_BYTES, **config})
        self.offloader: KVOffloader[str] = KVOffloader(storage, BLOCK_BYTES, self.kv, self.outbox)
        self.saved: list[int] = []

    def save(self, num_blocks: int) -> list[Any]:
        self.note(self.offloader.save(HASHES[:num_blocks], "whose"))
        return self.outbox.take()

    def note(self, saved: Saved[str] | None) -> None:
        """Remember how many blocks a save that is over has in the store."""
        if saved is not None:
            assert saved.owner == "whose"
            self.saved.append(saved.num_blocks)

    def through(self, stage: StageKV, num_stored: int) -> None:
        """Let a save come to its end."""
        assert self.offloader.staged(KVStaged(stage.key)) is None
        [store] = self.outbox.take()
        assert isinstance(store, StoreKV)
        assert list(store.slots) == list(stage.slots)
        self.note(self.offloader.stored(KVStored(stage.key, num_stored, num_stored)))


def test_blocks_are_held_for_the_copy_only_and_slots_until_they_are_written() -> None:
    harness = Desk()
    [stage] = harness.save(3)
    assert stage.blocks == harness.blocks[:3]
    assert (harness.kv.num_referenced, harness.offloader.is_staging) == (3, True)
    harness.note(harness.offloader.staged(KVStaged(stage.key)))
    assert harness.kv.num_referenced == 0
    assert not harness.offloader.is_staging
    [store] = harness.outbox.take()
    assert isinstance(store, StoreKV)
    assert store.hashes == HASHES[:3]
    assert len(harness.offloader) == 1
    [other] = harness.save(8)
    assert not set(other.slots) & set(store.slots)
    harness.note(harness.offloader.stored(KVStored(stage.key, 3, 3)))
    assert harness.saved == [3]
    assert harness.offloader.counters["kv_bytes_saved"] == 3 * BLOCK_BYTES


def test_what_staging_memory_has_no_room_for_is_not_saved() -> None:
    harness = Desk()
    [stage] = harness.save(8)
    assert len(stage.blocks) == SLOTS
    assert harness.offloader.counters["kv_blocks_not_saved"] == 4
    assert not harness.save(8)
    assert harness.saved == [4]  # those before it are on their way; none of its own could be
    harness.through(stage, 4)
    assert harness.saved == [4, 4]


def test_only_what_the_store_lacks_is_written() -> None:
    harness = Desk()
    [stage] = harness.save(3)
    harness.through(stage, 3)
    assert not harness.save(3)
    assert harness.saved == [3, 3]
    [more] = harness.save(5)
    assert more.blocks == harness.blocks[3:5]
    harness.through(more, 2)
    assert harness.saved == [3, 3, 5]


@pytest.mark.parametrize("num_stored", [0, 1])
def test_what_could_not_be_written_is_tried_again(num_stored: int) -> None:
    harness = Desk()
    [stage] = harness.save(3)
    harness.through(stage, num_stored)
    assert harness.saved == [num_stored]
    [again] = harness.save(3)
    assert again.blocks == harness.blocks[num_stored:3]


def test_what_the_store_lost_is_written_again() -> None:
    harness = Desk()
    [stage] = harness.save(3)
    harness.through(stage, 3)
    harness.offloader.forget(HASHES[1:3])
    [again] = harness.save(3)
    assert again.blocks == harness.blocks[1:3]


def test_what_was_stored_long_ago_is_offered_again() -> None:
    """A store that came back empty must not stay without the beginnings of all that follows."""
    harness = Desk()
    [stage] = harness.save(3)
    harness.through(stage, 3)
    harness.outbox.now += 59.0
    assert not harness.save(3)
    harness.outbox.now += 1.0
    [again] = harness.save(3)
    assert again.blocks == harness.blocks[:3]
    harness.through(again, 3)
    assert not harness.save(3)


def test_what_was_read_from_the_store_is_not_written_to_it() -> None:
    harness = Desk()
    harness.offloader.remember(HASHES[:2])
    [stage] = harness.save(3)
    assert stage.blocks == harness.blocks[2:3]


def test_a_copy_that_broke_is_not_written() -> None:
    harness = Desk()
    [stage] = harness.save(3)
    harness.note(harness.offloader.staged(KVStaged(stage.key, copied=False)))
    assert not harness.outbox.take()
    assert harness.saved == [0]
    assert harness.kv.num_referenced == 0
    assert len(harness.save(8)[0].blocks) == SLOTS


def test_blocks_that_are_not_in_the_pool_any_more_are_not_saved() -> None:
    harness = Desk(num_published=2)
    [stage] = harness.save(5)
    assert stage.blocks == harness.blocks
    assert harness.offloader.counters["kv_blocks_not_saved"] == 3


@pytest.mark.parametrize("config", [{"backend": "none"}, {"write_policy": "off"}])
def test_without_a_store_to_write_to_there_is_no_staging_memory(config: dict[str, Any]) -> None:
    harness = Desk(**config)
    harness.offloader.remember(HASHES[:2])
    assert not harness.save(3)
    assert harness.saved == [0]
    assert not any(harness.offloader.counters.values())


def test_staging_memory_has_room_for_a_block_however_large() -> None:
    assert num_staging_slots(StorageConfig(backend="file", staging=1 << 16), 1 << 30) == 1
