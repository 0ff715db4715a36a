"""KV memory: one pool, several mappings of it, and handles that mean it no longer."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from support.ids import block_ids
from support.leaks import Belongings

from kvrelay.errors import ConfigError, GeometryMismatchError, PeerLostError
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry

GEOMETRY = KVGeometry(3, 2, 4, 8, "float16", "model")


@pytest.fixture
def memory() -> Iterator[KVMemory]:
    made = KVMemory.create(GEOMETRY, num_blocks=10)
    yield made
    made.close()


def test_planes_are_layers_by_k_and_v_by_blocks(memory: KVMemory) -> None:
    assert memory.planes.shape == (3, 2, 10, 8 * 2 * 4 * 2)
    assert memory.size_bytes == 10 * GEOMETRY.block_bytes == memory.planes.size
    assert not memory.planes.any()


def test_both_sides_of_a_mapping_see_the_same_bytes(memory: KVMemory) -> None:
    other = KVMemory.attach(GEOMETRY, memory.handle)
    other.planes[2, 1, 9, -1] = 200
    assert memory.planes[2, 1, 9, -1] == 200
    other.close()
    assert memory.planes[2, 1, 9, -1] == 200


def test_another_process_can_map_it(memory: KVMemory) -> None:
    memory.planes[:] = 7
    handle = msgspec.json.encode(memory.handle).decode()
    script = f"""
import msgspec
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.kv_pool.host_memory import KVMemory, KVMemoryHandle
geometry = KVGeometry(3, 2, 4, 8, "float16", "model")
memory = KVMemory.attach(geometry, msgspec.json.decode('{handle}', type=KVMemoryHandle))
assert (memory.planes == 7).all()
memory.planes[0, 0, 0] = 9
memory.close()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)
    assert (memory.planes[0, 0, 0] == 9).all()
    assert (memory.planes[0, 0, 1:] == 7).all()


def test_more_memory_than_the_machine_has_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"cache.num_blocks: 1,099,511,627,776 blocks take [\d,]+ bytes: this machine"
    ):
        KVMemory.create(GEOMETRY, num_blocks=1 << 40)


def test_memory_that_the_kernel_does_not_give_is_refused_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(ConfigError, match=r"cache.num_blocks: 10 blocks take 7,680 bytes: Cannot allocate memory"):
        KVMemory.create(GEOMETRY, num_blocks=10)


def test_memory_that_cannot_be_mapped_leaves_no_descriptor(memory: KVMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, length: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    before = Belongings.now()
    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        KVMemory.attach(GEOMETRY, memory.handle)
    assert before.leaked() == []


def test_memory_lives_until_its_last_mapping_is_closed() -> None:
    made = KVMemory.create(GEOMETRY, num_blocks=2)
    other = KVMemory.attach(GEOMETRY, made.handle)
    made.planes[:] = 5
    made.close()
    assert (other.planes == 5).all()
    other.close()


def test_closing_while_a_view_is_alive_leaves_the_view_good() -> None:
    made = KVMemory.create(GEOMETRY, num_blocks=2)
    view = made.planes[0]
    view[:] = 3
    made.close()
    assert (view == 3).all()


def test_a_closed_memory_cannot_be_attached() -> None:
    made = KVMemory.create(GEOMETRY, num_blocks=2)
    made.close()
    with pytest.raises(PeerLostError):
        KVMemory.attach(GEOMETRY, made.handle)


def test_a_process_that_is_gone_is_a_lost_peer(memory: KVMemory) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    with pytest.raises(PeerLostError, match=str(process.pid)):
        KVMemory.attach(GEOMETRY, msgspec.structs.replace(memory.handle, pid=process.pid))


def test_a_reused_descriptor_is_told_by_its_tag(memory: KVMemory) -> None:
    other = KVMemory.create(GEOMETRY, num_blocks=10)
    with pytest.raises(PeerLostError, match="is not the process that created"):
        KVMemory.attach(GEOMETRY, msgspec.structs.replace(memory.handle, fd=other.handle.fd))
    other.close()


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"dtype": "float32"}, {"block_size": 16}])
def test_another_geometry_is_refused(memory: KVMemory, change: dict[str, object]) -> None:
    with pytest.raises(GeometryMismatchError):
        KVMemory.attach(msgspec.structs.replace(GEOMETRY, **change), memory.handle)


def test_another_number_of_blocks_is_refused(memory: KVMemory) -> None:
    with pytest.raises(GeometryMismatchError):
        KVMemory.attach(GEOMETRY, msgspec.structs.replace(memory.handle, num_blocks=11))


def test_refused_attachments_leave_no_descriptor(memory: KVMemory) -> None:
    before = Belongings.now()
    for change in ({"num_blocks": 11}, {"tag": "0" * 16}):
        with pytest.raises((GeometryMismatchError, PeerLostError)):
            KVMemory.attach(GEOMETRY, msgspec.structs.replace(memory.handle, **change))
    assert before.leaked() == []


def test_read_gives_views_of_runs_plane_by_plane() -> None:
    large = KVGeometry(3, 8, 128, 32, "float32", "model")
    made = KVMemory.create(large, num_blocks=10)
    made.planes[:] = np.arange(10, dtype=np.uint8)[None, None, :, None]
    parts = made.read(range(1, 2), block_ids(4, 5, 6, 2))
    assert [part.nbytes for part in parts] == [3 * large.plane_block_bytes, large.plane_block_bytes] * 2
    assert [part[0] for part in parts] == [4, 2, 4, 2]
    assert all(np.shares_memory(np.frombuffer(part, np.uint8), made.planes[1]) for part in parts)
    del parts
    made.close()


def test_digest_is_that_of_what_is_read_and_copied(memory: KVMemory) -> None:
    memory.planes[:] = np.random.default_rng(3).integers(0, 255, memory.planes.shape, np.uint8)
    other = KVMemory.create(GEOMETRY, num_blocks=10)
    expected = xxhash.xxh3_64_intdigest(b"".join(memory.read(range(1, 3), block_ids(7, 1, 2))))
    assert memory.digest(range(1, 3), block_ids(7, 1, 2)) == expected
    gathered = bytearray(3 * 2 * GEOMETRY.layer_block_bytes)
    assert memory.gather(range(1, 3), block_ids(7, 1, 2), memoryview(gathered)) == expected
    assert gathered == b"".join(memory.read(range(1, 3), block_ids(7, 1, 2)))
    assert other.copy_from(memory, range(1, 3), block_ids(0, 5, 9), block_ids(7, 1, 2)) == expected
    assert np.array_equal(other.planes[1:, :, [0, 5, 9]], memory.planes[1:, :, [7, 1, 2]])
    assert not other.planes[0].any()
    other.close()


def test_blocks_go_out_and_come_in_whole(memory: KVMemory) -> None:
    memory.planes[:] = np.random.default_rng(4).integers(0, 255, memory.planes.shape, np.uint8)
    copies = [np.empty((3, 2, GEOMETRY.plane_block_bytes), np.uint8) for _ in range(2)]
    memory.copy_out(block_ids(8, 3), copies)
    with memory.lend(block_ids(0, 1)) as blocks:
        for block, copy in zip(blocks, copies, strict=True):
            block[:] = copy
    assert np.array_equal(memory.planes[:, :, [0, 1]], memory.planes[:, :, [8, 3]])


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_only_a_large_pool_asks_for_huge_pages() -> None:
    for num_blocks, asked in ((10, False), (1 + (16 << 20) // GEOMETRY.block_bytes, True)):
        memory = KVMemory.create(GEOMETRY, num_blocks)
        address = memory.planes.ctypes.data
        _, entry = Path("/proc/self/smaps").read_text().split(f"\n{address:x}-", 1)
        flags = entry.split("VmFlags:", 1)[1].splitlines()[0].split()
        assert ("hg" in flags) is asked
        memory.close()
