"""The ``memory`` backend: readers and writers of the same slots."""

from __future__ import annotations

import asyncio

import pytest
from storage_rooms import GEOMETRY, HASHES, MemoryRoom, backend_of, planes, views
from support.loops import run

from kvstore.storage.block_format import BlockFormat, Value
from kvstore.storage.calls import PutCall
from kvstore.storage.interface import PutOutcome


@pytest.mark.parametrize("drop_first", [False, True])
def test_a_slot_that_is_read_is_not_given_to_a_writer(monkeypatch: pytest.MonkeyPatch, drop_first: bool) -> None:
    """While block 0 is read, as many others are written as there are slots, and it may be deleted too."""

    async def check() -> None:
        store = MemoryRoom().store(num_blocks=3)
        await store.open()
        backend = backend_of(store)
        await store.put(HASHES[:1], views(planes(1)))
        is_good, intruder = BlockFormat.is_good, PutCall(BlockFormat(GEOMETRY), HASHES[1:4], views(planes(4))[1:])

        def intruded(self: BlockFormat, value: Value, block_hash: bytes) -> bool:
            good = is_good(self, value, block_hash)
            if drop_first:
                backend._drop(HASHES[0])
            backend._put(intruder)
            return good

        monkeypatch.setattr(BlockFormat, "is_good", intruded)
        pool = planes(1, None)
        assert await store.get(HASHES[:1], views(pool)) == [True]
        assert (pool == planes(1)).all()
        assert intruder.outcomes == [PutOutcome.WRITTEN, PutOutcome.WRITTEN, PutOutcome.FAILED]
        monkeypatch.undo()
        assert await store.put(HASHES[4:7], views(planes(7))[4:]) == [PutOutcome.WRITTEN] * 3
        await store.close()

    run(check())


def test_stores_of_one_process_are_apart() -> None:
    async def check() -> None:
        first, second = MemoryRoom().store(), MemoryRoom().store()
        await asyncio.gather(first.open(), second.open())
        await first.put(HASHES[:1], views(planes(1)))
        assert await second.longest_prefix(HASHES[:1]) == 0
        await asyncio.gather(first.close(), second.close())

    run(check())
