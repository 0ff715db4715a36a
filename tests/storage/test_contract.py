"""What every backend does, whatever it keeps its blocks in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from storage_rooms import GEOMETRY, HASHES, Room, planes, views
from support.loops import run

from kvrelay.errors import LocalProtocolError, StorageError
from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.block_format import HEADER_BYTES
from kvstore.storage.interface import KVStore, PutOutcome, StoreCounters

WRITTEN, PRESENT, FAILED = PutOutcome.WRITTEN, PutOutcome.PRESENT, PutOutcome.FAILED


@asynccontextmanager
async def opened(room: Room, geometry: KVGeometry = GEOMETRY, num_blocks: int = 100) -> AsyncIterator[KVStore]:
    store = room.store(geometry, num_blocks)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def get(store: KVStore, block_hashes: list[bytes]) -> tuple[list[bool], list[bytes]]:
    """Return hits, and what the blocks hold afterwards that held zeros before."""
    pool = planes(len(block_hashes), None)
    hits = await store.get(block_hashes, views(pool))
    return hits, [block.tobytes() for block in views(pool)]


ZEROS = bytes(GEOMETRY.block_bytes)

# ---------------------------------------------------------------- put and get


def test_what_was_put_comes_back_byte_for_byte(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            pool = planes(20)
            blocks = views(pool, [7, 3, 19, 0])
            assert await store.put(HASHES[:4], blocks) == [WRITTEN] * 4
            assert await get(store, HASHES[:4]) == ([True] * 4, [block.tobytes() for block in blocks])
            assert (pool == planes(20)).all()

    run(check())


def test_only_the_given_blocks_of_a_pool_are_written_to(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            await store.put(HASHES[:2], views(planes(2)))
            pool, expected = planes(10, 1), planes(10, 1)
            assert await store.get(HASHES[:2], views(pool, [4, 8])) == [True, True]
            expected[:, :, [4, 8]] = planes(2)
            assert (pool == expected).all()

    run(check())


def test_a_miss_leaves_the_block_as_it_was(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            await store.put([HASHES[1]], views(planes(1)))
            pool = planes(3, 5)
            assert await store.get(HASHES[:3], views(pool)) == [False, True, False]
            assert (pool[:, :, [0, 2]] == planes(3, 5)[:, :, [0, 2]]).all()
            assert (pool[:, :, 1] == planes(1)[:, :, 0]).all()

    run(check())


def test_blocks_that_are_there_are_not_written_again(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            first = planes(3)
            await store.put(HASHES[:3], views(first))
            assert await store.put(HASHES[:5], views(planes(5, 9))) == [PRESENT] * 3 + [WRITTEN] * 2
            assert (await get(store, HASHES[:3]))[1] == [block.tobytes() for block in views(first)]

    run(check())


def test_empty_calls(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            assert await store.put([], []) == []
            assert await store.get([], []) == []
            assert await store.longest_prefix([]) == 0
            assert await store.delete([]) == 0

    run(check())


def test_one_hash_several_times_in_a_call(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            block = views(planes(1))[0]
            outcomes = await store.put([HASHES[0]] * 3, [block] * 3)
            assert FAILED not in outcomes
            assert outcomes[0] is WRITTEN
            assert await get(store, [HASHES[0]] * 2) == ([True] * 2, [block.tobytes()] * 2)
            assert await store.delete([HASHES[0]]) == 1
            assert await store.longest_prefix([HASHES[0]]) == 0

    run(check())


def test_many_calls_at_once(room: Room) -> None:
    async def check() -> None:
        async with opened(room, num_blocks=600) as store:
            pool, rng = planes(60), random.Random(1)
            spans = [sorted(rng.sample(range(60), 2)) for _ in range(30)]
            puts = [store.put(HASHES[a:b], views(pool, range(a, b))) for a, b in spans]
            results = await asyncio.gather(*puts, *(get(store, HASHES[a:b]) for a, b in spans))
            assert FAILED not in [outcome for result in results[:30] for outcome in result]
            for hits, contents in results[30:]:
                assert all(hit == (content != ZEROS) for hit, content in zip(hits, contents, strict=True))
            stored = sorted({index for a, b in spans for index in range(a, b)})
            hits, contents = await get(store, [HASHES[index] for index in stored])
            assert contents == [block.tobytes() for block in views(pool, stored)]
            assert store.counters.corrupt_blocks == 0

    run(check())


# ---------------------------------------------------------------- looking, deleting


def test_longest_prefix_ends_at_the_first_gap(room: Room) -> None:
    async def check() -> None:
        async with opened(room, num_blocks=600) as store:
            await store.put(HASHES[:400], views(planes(400)))
            assert await store.longest_prefix(HASHES[:400]) == 400
            assert await store.longest_prefix(HASHES[:500]) == 400
            assert await store.longest_prefix(HASHES[400:500]) == 0
            await store.delete([HASHES[300], HASHES[310]])
            assert await store.longest_prefix(HASHES[:400]) == 300
            assert await store.longest_prefix(HASHES[301:400]) == 9
            await store.delete([HASHES[2]])
            assert await store.longest_prefix(HASHES[:400]) == 2

    run(check())


def test_delete_counts_what_was_there(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            await store.put(HASHES[:3], views(planes(3)))
            assert await store.delete([HASHES[1], HASHES[7]]) == 1
            assert (await get(store, HASHES[:3]))[0] == [True, False, True]
            assert await store.put(HASHES[:3], views(planes(3))) == [PRESENT, WRITTEN, PRESENT]

    run(check())


def test_clear_drops_all(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            await store.put(HASHES[:5], views(planes(5)))
            assert await store.clear() == 5
            assert await store.longest_prefix(HASHES[:5]) == 0
            assert await store.put(HASHES[:5], views(planes(5))) == [WRITTEN] * 5

    run(check())


def test_stats_and_counters_tell_what_happened(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            assert store.counters == StoreCounters()
            await store.put(HASHES[:5], views(planes(5)))
            await store.put(HASHES[:6], views(planes(6)))
            await get(store, HASHES[:8])
            size = GEOMETRY.block_bytes
            assert store.counters == StoreCounters(
                hit_blocks=6,
                missed_blocks=2,
                read_bytes=6 * size,
                written_blocks=6,
                present_blocks=5,
                written_bytes=6 * size,
            )
            stats = await store.stats()
            assert stats.num_blocks == (6 if room.listable else None)
            assert stats.used_bytes is None or stats.used_bytes >= 6 * size
            assert stats.capacity_bytes is None or stats.capacity_bytes >= 100 * size

    run(check())


# ---------------------------------------------------------------- bad values


def spoilt(value: np.ndarray, other: np.ndarray, how: str) -> np.ndarray:
    """Return ``value`` with the fault ``how``; ``other`` is another good one."""
    at = {"magic": 0, "version": 4, "namespace": 8, "hash": 24, "length": 56, "digest": 64, "first byte": HEADER_BYTES}
    match how:
        case "last byte":
            value[-1] ^= 1
        case "cut":
            return value[:-1]
        case "cut in the header":
            return value[:30]
        case "another block":
            return other
        case "zeros":
            value[:] = 0
        case _:
            value[at[how]] ^= 0x80
    return value


FAULTS = ["magic", "version", "namespace", "hash", "length", "digest", "first byte", "last byte"]
FAULTS += ["cut", "cut in the header", "another block", "zeros"]


@pytest.mark.fault("F22")
def test_a_bad_value_is_a_miss_counted_and_deleted(room: Room) -> None:
    async def check(store: KVStore, how: str, num_before: int) -> None:
        value, other = await room.read(store, HASHES[1]), await room.read(store, HASHES[2])
        await room.write(store, HASHES[1], spoilt(value, other, how))
        hits, contents = await get(store, HASHES[:3])
        assert (how, hits) == (how, [True, False, True])
        assert contents[1] == ZEROS
        assert store.counters.corrupt_blocks == num_before + 1
        assert await store.longest_prefix(HASHES[:3]) == 1
        assert await store.put(HASHES[:3], views(planes(3))) == [PRESENT, WRITTEN, PRESENT]
        assert (await get(store, HASHES[:3]))[0] == [True] * 3

    async def check_all() -> None:
        async with opened(room) as store:
            await store.put(HASHES[:3], views(planes(3)))
            for num_before, how in enumerate(FAULTS):
                await check(store, how, num_before)

    run(check_all())


def test_verify_finds_and_deletes_bad_values(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            await store.put(HASHES[:9], views(planes(9)))
            for index in (2, 5):
                value = await room.read(store, HASHES[index])
                value[-1] ^= 1
                await room.write(store, HASHES[index], value)
            if not room.listable:
                with pytest.raises(StorageError, match="list"):
                    await store.verify()
                return
            report = await store.verify()
            assert (report.num_blocks, report.num_corrupt) == (9, 2)
            report = await store.verify()
            assert (report.num_blocks, report.num_corrupt) == (7, 0)
            assert (await get(store, HASHES[:9]))[0] == [index not in (2, 5) for index in range(9)]

    run(check())


# ---------------------------------------------------------------- several stores


def test_another_geometry_is_another_world(room: Room) -> None:
    other = msgspec.structs.replace(GEOMETRY, model_digest="other")

    async def check() -> None:
        async with opened(room) as store, opened(room, other) as stranger:
            await store.put(HASHES[:3], views(planes(3)))
            assert await stranger.longest_prefix(HASHES[:3]) == 0
            assert await stranger.put(HASHES[:2], views(planes(2, 1, other))) == [WRITTEN] * 2
            assert await stranger.clear() == 2
            assert await get(store, HASHES[:3]) == ([True] * 3, [block.tobytes() for block in views(planes(3))])

    run(check())


def test_stores_of_one_place_see_each_others_blocks(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as first, opened(room) as second:
            await first.put(HASHES[:3], views(planes(3)))
            found = 3 if room.shared else 0
            assert await second.longest_prefix(HASHES[:3]) == found
            assert (await get(second, HASHES[:3]))[0] == [room.shared] * 3
            assert await second.delete([HASHES[0]]) == room.shared
            assert await first.longest_prefix(HASHES[:3]) == (0 if room.shared else 3)

    run(check())


def test_blocks_outlive_the_store_that_wrote_them(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            await store.put(HASHES[:3], views(planes(3)))
        async with opened(room) as store:
            hits, contents = await get(store, HASHES[:3])
            assert hits == [room.lasting] * 3
            if room.lasting:
                assert contents == [block.tobytes() for block in views(planes(3))]

    run(check())


# ---------------------------------------------------------------- room for so many


def test_the_least_recently_used_goes_first(bounded_room: Room) -> None:
    async def check() -> None:
        async with opened(bounded_room, num_blocks=4) as store:
            await store.put(HASHES[:2], views(planes(2)))
            await store.put(HASHES[2:4], views(planes(2)))
            await get(store, [HASHES[0]])
            await store.put([HASHES[3]], views(planes(1)))
            assert await store.put(HASHES[4:6], views(planes(2))) == [WRITTEN] * 2
            assert (await get(store, HASHES[:6]))[0] == [True, False, False, True, True, True]
            assert store.counters.evicted_blocks == 2

    run(check())


def test_of_one_sequence_the_last_block_goes_first(bounded_room: Room) -> None:
    async def check() -> None:
        async with opened(bounded_room, num_blocks=4) as store:
            await store.put(HASHES[:4], views(planes(4)))
            await store.put([HASHES[10]], views(planes(1)))
            assert await store.longest_prefix(HASHES[:4]) == 3
            await get(store, HASHES[:3])
            await store.put(HASHES[11:13], views(planes(2)))
            assert await store.longest_prefix(HASHES[:4]) == 2

    run(check())


def test_a_sequence_longer_than_the_store_keeps_its_beginning(bounded_room: Room) -> None:
    async def check() -> None:
        async with opened(bounded_room, num_blocks=4) as store:
            await store.put(HASHES[10:13], views(planes(3)))
            assert await store.put(HASHES[:7], views(planes(7))) == [WRITTEN] * 4 + [FAILED] * 3
            assert await store.longest_prefix(HASHES[:7]) == 4
            assert store.counters.failed_blocks == 3

    run(check())


# ---------------------------------------------------------------- misuse


def test_arguments_that_do_not_fit_are_refused(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            block = views(planes(1))[0]
            unfit: list[tuple[list[bytes], list[Any]]] = [
                (HASHES[:2], [block]),
                ([b"short"], [block]),
                ([HASHES[0]], [block[:1]]),
                ([HASHES[0]], [block.view(np.int8)]),
            ]
            for hashes, blocks in unfit:
                with pytest.raises(LocalProtocolError):
                    await store.put(hashes, blocks)
                with pytest.raises(LocalProtocolError):
                    await store.get(hashes, blocks)
            with pytest.raises(LocalProtocolError):
                await store.longest_prefix([b"short"])
            with pytest.raises(LocalProtocolError):
                await store.delete([b"short"])

    run(check())


def test_a_closed_store_is_of_no_use(room: Room) -> None:
    async def check() -> None:
        async with opened(room) as store:
            pass
        await store.close()
        for use in (
            store.put(HASHES[:1], views(planes(1))),
            store.get(HASHES[:1], views(planes(1))),
            store.longest_prefix(HASHES[:1]),
            store.stats(),
        ):
            with pytest.raises(LocalProtocolError, match="closed"):
                await use

    run(check())
