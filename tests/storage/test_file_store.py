"""The ``file`` backend: its directory, what befalls its files, and how it shares them."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from storage_rooms import GEOMETRY, HASHES, FileRoom, HandClock, backend_of, planes, views
from support.loops import run

from kvrelay.errors import StorageError
from kvstore.storage import file_directory
from kvstore.storage.block_format import HEADER_BYTES
from kvstore.storage.file_layout import SETS_OFFSET, Layout
from kvstore.storage.file_lock import try_lock
from kvstore.storage.file_store import FileBackend
from kvstore.storage.interface import KVStore, PutOutcome
from kvstore.storage.store import Store

WRITTEN, FAILED = PutOutcome.WRITTEN, PutOutcome.FAILED


@asynccontextmanager
async def opened(path: Path, num_blocks: int = 100, **change: Any) -> AsyncIterator[KVStore]:
    store = FileRoom(path).store(msgspec.structs.replace(GEOMETRY, **change), num_blocks)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def place(path: Path) -> Path:
    [only] = [entry for entry in path.iterdir() if entry.is_dir()]
    return only


def found(path: Path, name: str) -> list[Path]:
    return list(path.glob(f"*/{name}"))


async def hits(store: KVStore, count: int) -> list[int]:
    """Return which of the first ``count`` blocks are there; each must be what ``planes`` says."""
    pool, expected = planes(count, None), planes(count)
    delivered = await store.get(HASHES[:count], views(pool))
    assert all((pool[:, :, index] == expected[:, :, index] * hit).all() for index, hit in enumerate(delivered))
    return [index for index, hit in enumerate(delivered) if hit]


# ---------------------------------------------------------------- layout


def test_all_files_together_stay_within_the_capacity() -> None:
    rng = random.Random(0)
    for _ in range(300):
        capacity, value_bytes = rng.randrange(1 << 16, 1 << 36), rng.randrange(100, 1 << 24)
        layout = Layout.plan(bytes(16), value_bytes, capacity)
        assert layout.size_bytes <= capacity or not layout.num_slots
        assert sum(layout.slab_slots) == layout.num_slots
        assert len(layout.slab_slots) <= 66
        assert layout.slot_bytes >= value_bytes
        assert Layout.unpack(layout.pack()) == layout
        wasted = capacity - layout.size_bytes
        assert wasted <= SETS_OFFSET + 64 * (layout.slot_bytes + 64)


def test_slabs_are_preallocated(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path):
            slab = place(tmp_path) / "slab-0000"
            assert slab.stat().st_blocks * 512 >= slab.stat().st_size == 64 * 4096

    run(check())


def test_no_room_for_one_block(tmp_path: Path) -> None:
    async def check() -> None:
        with pytest.raises(StorageError, match="no room"):
            async with opened(tmp_path, 0):
                pass

    run(check())


# ---------------------------------------------------------------- directory


def test_a_path_that_cannot_be_a_directory(tmp_path: Path) -> None:
    async def check() -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot keep KV"):
            async with opened(tmp_path / "file" / "kv"):
                pass

    run(check())


def test_an_index_that_this_user_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, which may write everything: the system call is made to refuse."""

    async def check() -> None:
        async with opened(tmp_path):
            pass

    run(check())
    real = os.open

    def refuse_index(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith("index") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse_index)
    with pytest.raises(StorageError, match=r"cannot use the KV in .*Permission denied"):
        run(check())


def test_a_disk_that_is_too_small_is_not_filled(tmp_path: Path) -> None:
    async def check() -> None:
        with pytest.raises(StorageError, match="No space left"):
            async with opened(tmp_path, (32 << 40) // 4096):
                pass
        assert not found(tmp_path, "slab-*")

    run(check())


def test_another_capacity_makes_a_new_store_if_nobody_uses_the_old(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path, 20) as store:
            await store.put(HASHES[:3], views(planes(3)))
        async with opened(tmp_path, 30) as store:
            assert (await store.stats()).capacity_bytes == 30 * 4096
            assert await hits(store, 3) == []

    run(check())


def test_who_joins_others_takes_their_capacity(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path, 20) as first:
            await first.put(HASHES[:3], views(planes(3)))
            async with opened(tmp_path, 30) as second:
                assert (await second.stats()).capacity_bytes == 20 * 4096
                assert await hits(second, 3) == [0, 1, 2]

    run(check())


def test_a_geometry_nobody_uses_makes_room_for_the_next(tmp_path: Path) -> None:
    async def check() -> None:
        (tmp_path / "0123456789abcdef0123456789abcdef").mkdir()
        (tmp_path / "notes").write_text("not ours")
        async with opened(tmp_path) as store:
            await store.put(HASHES[:3], views(planes(3)))
            async with opened(tmp_path, model_digest="other"):
                assert await hits(store, 3) == [0, 1, 2]
        assert len(found(tmp_path, "index")) == 2
        async with opened(tmp_path, model_digest="third"):
            pass
        assert len(found(tmp_path, "index")) == 1
        assert (tmp_path / "notes").exists()
        assert (tmp_path / "0123456789abcdef0123456789abcdef").exists()

    run(check())


def test_a_damaged_beginning_of_the_index_makes_a_new_store(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path) as store:
            await store.put(HASHES[:3], views(planes(3)))
            index = place(tmp_path) / "index"
        for damaged in (b"", b"short", bytes(index.stat().st_size)):
            index.write_bytes(damaged)
            async with opened(tmp_path) as store:
                assert await hits(store, 3) == []
                assert await store.put(HASHES[:3], views(planes(3))) == [WRITTEN] * 3

    run(check())


# ---------------------------------------------------------------- damage


def test_slabs_and_index_that_are_cut_while_in_use(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path, 64) as store:
            await store.put(HASHES[:60], views(planes(60)))
            slab = place(tmp_path) / "slab-0000"
            os.truncate(slab, slab.stat().st_size // 2 + HEADER_BYTES)
            left = await hits(store, 60)
            assert 0 < len(left) < 60
            assert store.counters.corrupt_blocks == 60 - len(left)
            assert FAILED not in await store.put(HASHES[:60], views(planes(60)))
            assert len(await hits(store, 60)) == 60
            os.truncate(place(tmp_path) / "index", SETS_OFFSET + 1000)
            assert len(await hits(store, 60)) < 60
            assert FAILED not in await store.put(HASHES[:60], views(planes(60)))
            assert len(await hits(store, 60)) == 60

    run(check())


@pytest.mark.parametrize("seed", range(5))
def test_random_damage_is_never_served(tmp_path: Path, seed: int) -> None:
    async def check() -> None:
        rng = random.Random(seed)
        async with opened(tmp_path, 128) as store:
            await store.put(HASHES[:120], views(planes(120)))
            for name, first in (("index", SETS_OFFSET), ("slab-0000", 0)):
                file = place(tmp_path) / name
                with file.open("r+b") as damaged:
                    for _ in range(60):
                        damaged.seek(rng.randrange(first, file.stat().st_size))
                        damaged.write(rng.randbytes(rng.choice([1, 8, 64, 1000])))
            before = await hits(store, 120)
            assert 0 < len(before) < 120
            await store.verify()
            assert await hits(store, 120) == before
            assert (await store.verify()).num_corrupt == 0
            await store.put(HASHES[:120], views(planes(120)))
            await hits(store, 120)

    run(check())


def test_a_disk_that_is_full_or_broken_fails_single_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with opened(tmp_path) as store:
            slabs = backend_of(store)._slabs

            def no_space(slot: int, value: object) -> bool:
                raise OSError(errno.ENOSPC, "no space")

            def broken(slot: int, value: object) -> bool:
                raise OSError(errno.EIO, "broken")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(slabs, "write", no_space)
                assert await store.put(HASHES[:20], views(planes(20))) == [FAILED] * 20
            assert store.counters.errors > 0
            assert await store.put(HASHES[:20], views(planes(20))) == [WRITTEN] * 20
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(slabs, "read", broken)
                assert await hits(store, 3) == []
            assert await hits(store, 20) == list(range(3, 20))

    run(check())


# ---------------------------------------------------------------- sharing


def impatient(path: Path, clock: HandClock) -> Store:
    backend = FileBackend(GEOMETRY, path, SETS_OFFSET + 4 * (4096 + 64), 0.05, clock)
    return Store(backend, GEOMETRY, 10.0, clock)


def test_a_process_that_hangs_with_the_index_stops_writers_only(tmp_path: Path) -> None:
    async def check() -> None:
        store = impatient(tmp_path, HandClock())
        await store.open()
        await store.put(HASHES[:2], views(planes(2)))
        other = os.open(place(tmp_path) / "index", os.O_RDWR)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert await hits(store, 2) == [0, 1]
        assert await store.put(HASHES[:3], views(planes(3))) == [PutOutcome.PRESENT] * 2 + [FAILED]
        assert store.counters.errors == 1
        os.close(other)
        await store.close()

    run(check())


def test_what_a_dead_writer_reserved_is_taken_again_in_time(tmp_path: Path) -> None:
    async def check() -> None:
        clock = HandClock()
        store = impatient(tmp_path, clock)
        await store.open()
        index = backend_of(store)._index
        assert None not in index.reserve(HASHES[10:13], set(), int(clock.now() * 1e9))
        assert await store.put(HASHES[:2], views(planes(2))) == [WRITTEN, FAILED]
        clock.now_s += 1.0
        assert await store.put(HASHES[:4], views(planes(4))) == [PutOutcome.PRESENT] + [WRITTEN] * 3
        await store.close()

    run(check())


def test_a_writer_that_lost_its_slot_does_not_publish(tmp_path: Path) -> None:
    async def check() -> None:
        clock = HandClock()
        store = impatient(tmp_path, clock)
        await store.open()
        index, now_ns = backend_of(store)._index, int(clock.now() * 1e9)
        lost = index.reserve(HASHES[:4], set(), now_ns)
        late_ns = now_ns + 10**9
        kept = index.reserve(HASHES[4:8], set(), late_ns)
        assert {place.slot for place in kept} == {place.slot for place in lost}
        assert index.publish(list(zip(HASHES[:4], lost, strict=True)), [late_ns] * 4) == [False] * 4
        index.release(lost)
        assert index.publish(list(zip(HASHES[4:8], kept, strict=True)), [late_ns] * 4) == [True] * 4
        assert await store.longest_prefix(HASHES[4:8]) == 4
        await store.close()

    run(check())


def test_a_block_with_a_time_far_ahead_is_the_first_to_go(tmp_path: Path) -> None:
    async def check() -> None:
        clock = HandClock()
        store = impatient(tmp_path, clock)
        await store.open()
        clock.now_s += 1e6
        await store.put(HASHES[:1], views(planes(1)))
        clock.now_s -= 1e6
        await store.put(HASHES[1:4], views(planes(4))[1:])
        await store.put(HASHES[4:5], views(planes(5))[4:])
        assert await hits(store, 5) == [1, 2, 3, 4]
        await store.close()

    run(check())


def test_a_clock_that_was_set_back_does_not_make_sequences_evict_themselves(tmp_path: Path) -> None:
    async def check() -> None:
        clock = HandClock()
        store = impatient(tmp_path, clock)
        await store.open()
        await store.put(HASHES[:1], views(planes(1)))
        clock.now_s += 60
        await store.put(HASHES[10:13], views(planes(3)))
        clock.now_s -= 60
        assert await store.put(HASHES[:3], views(planes(3))) == [PutOutcome.PRESENT, WRITTEN, WRITTEN]
        assert await hits(store, 3) == [0, 1, 2]
        await store.close()

    run(check())


def test_a_slot_that_another_block_has_now_is_not_taken_from_it(tmp_path: Path) -> None:
    """A reader that finds a value changed under its hands must tell an eviction from a corrupt block."""

    async def check() -> None:
        async with opened(tmp_path, 1) as store:
            await store.put(HASHES[:1], views(planes(1)))
            backend = backend_of(store)
            place = backend._index.find(HASHES[0])
            await store.put(HASHES[1:2], views(planes(2))[1:])
            assert not backend._drop_corrupt(HASHES[0], place)
            assert not backend._drop_corrupt(HASHES[1], place)
            assert store.counters.corrupt_blocks == 0
            assert await hits(store, 2) == [1]

    run(check())


@pytest.mark.parametrize("before_sharing", [False, True])
def test_a_directory_that_is_removed_while_it_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_sharing: bool
) -> None:
    """As another process does that opens another geometry at that moment."""
    removed: list[Path] = []
    other_root = tmp_path.with_name("other")
    other_place = other_root / FileRoom(tmp_path).namespace

    def remove_then_lock(fd: int, *, shared: bool = False) -> bool:
        if not removed and shared == before_sharing:
            removed.append(place(tmp_path))
            for path in removed[0].iterdir():
                path.unlink()
            removed[0].rmdir()
            if before_sharing:  # and somebody else makes it anew
                shutil.copytree(other_place, removed[0])
        return try_lock(fd, shared=shared)

    async def check() -> None:
        async with opened(other_root):
            pass
        monkeypatch.setattr(file_directory, "try_lock", remove_then_lock)
        async with opened(tmp_path) as store:
            assert await store.put(HASHES[:3], views(planes(3))) == [WRITTEN] * 3
            async with opened(tmp_path) as other:
                assert await hits(other, 3) == [0, 1, 2]
            async with opened(tmp_path, model_digest="other"):
                assert len(found(tmp_path, "index")) == 2, "it is in use and must stay"
        assert removed

    run(check())
