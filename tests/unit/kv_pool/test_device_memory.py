"""A pool on a device, here a simulated one: its handle, its table of digests, and blocks that come and go."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from support.ids import block_ids

from kvrelay.errors import ConfigError, GeometryMismatchError, PeerLostError
from kvrelay.kv_pool.attach import open_pool
from kvrelay.kv_pool.block_digest import Words, digest_blocks, fold
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.kv_pool.simulated_blocks import SimulatedBlocks
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId
from kvrelay.protocol.kv_handle import KVDeviceHandle, KVHandle

GEOMETRY = KVGeometry(3, 2, 4, 8, "float16", "model")
WORDS = GEOMETRY.plane_block_bytes // 8
EVERY = range(3)


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    made = DeviceMemory.create(GEOMETRY, 10, "simulated")
    yield made
    made.close()


def fill(memory: DeviceMemory, seed: int = 3) -> None:
    """Do as an engine does that computes every block."""
    shape = memory.blocks.words.shape
    memory.blocks.words[:] = np.random.default_rng(seed).integers(-(1 << 62), 1 << 62, shape)
    memory.begin_digest(EVERY, block_ids(*range(memory.num_blocks))).wait()


def test_handle_opens_the_same_blocks_and_digests(memory: DeviceMemory) -> None:
    fill(memory)
    handle = msgspec.json.decode(msgspec.json.encode(memory.handle), type=KVHandle)
    other = open_pool(GEOMETRY, handle)
    assert isinstance(other, DeviceMemory)
    assert other.read(EVERY, block_ids(3, 9)) == memory.read(EVERY, block_ids(3, 9))
    assert other.digest(range(1, 3), block_ids(7, 1)) == memory.digest(range(1, 3), block_ids(7, 1))
    other.close()


def test_what_a_killed_process_leaves_can_be_read_until_it_is_closed_and_not_opened_again() -> None:
    script = """
import sys, msgspec
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.protocol.geometry import KVGeometry
memory = DeviceMemory.create(KVGeometry(3, 2, 4, 8, "float16", "model"), 10, "simulated")
memory.blocks.words[:] = 5
print(msgspec.json.encode(memory.handle).decode(), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        handle = msgspec.json.decode(process.stdout.readline(), type=KVDeviceHandle)
        source = DeviceMemory.attach(GEOMETRY, handle)
        process.kill()
    target = DeviceMemory.create(GEOMETRY, 4, "simulated")
    target.copy_from(source, EVERY, block_ids(0), block_ids(9))
    assert (target.blocks.words[:, 0] == 5).all()
    source.close()
    target.close()
    with pytest.raises(PeerLostError, match=str(handle.pid)):
        DeviceMemory.attach(GEOMETRY, handle)


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"block_size": 16}])
def test_another_geometry_is_refused(memory: DeviceMemory, change: dict[str, object]) -> None:
    with pytest.raises(GeometryMismatchError):
        DeviceMemory.attach(msgspec.structs.replace(GEOMETRY, **change), memory.handle)


@pytest.mark.parametrize("change", [{"tag": "0" * 16}, {"memory": b'{"pid":1,"fd":9999,"tag":""}'}])
def test_a_handle_that_means_another_memory_is_refused(memory: DeviceMemory, change: dict[str, object]) -> None:
    with pytest.raises(PeerLostError):
        DeviceMemory.attach(GEOMETRY, msgspec.structs.replace(memory.handle, **change))


def test_blocks_that_are_no_whole_words_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache.block_size"):
        DeviceMemory.create(KVGeometry(3, 1, 3, 1, "float16", "model"), 10, "simulated")


def test_memory_that_the_machine_does_not_give_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"cache.num_blocks: 1,125,899,906,842,624 blocks take"):
        DeviceMemory.create(GEOMETRY, 1 << 50, "simulated")


def test_every_way_of_writing_notes_the_digests(memory: DeviceMemory) -> None:
    other = DeviceMemory.create(GEOMETRY, 10, "simulated")
    fill(other)
    payload = other.read(range(1, 3), block_ids(7, 1))
    memory.write(range(1, 3), block_ids(0, 5), [payload[0][:100], payload[0][100:]])
    assert memory.digest(range(1, 3), block_ids(0, 5)) == other.digest(range(1, 3), block_ids(7, 1))
    gathered = bytearray(payload[0].nbytes)
    assert other.gather(range(1, 3), block_ids(7, 1), memoryview(gathered)) == other.digest(
        range(1, 3), block_ids(7, 1)
    )
    assert gathered == payload[0]
    copied = memory.copy_from(other, EVERY, block_ids(9, 2, 3), block_ids(4, 8, 0))
    assert copied == memory.digest(EVERY, block_ids(9, 2, 3)) == other.digest(EVERY, block_ids(4, 8, 0))
    assert memory.read(EVERY, block_ids(9, 2, 3)) == other.read(EVERY, block_ids(4, 8, 0))
    blocks = [np.empty((3, 2, GEOMETRY.plane_block_bytes), np.uint8) for _ in range(2)]
    other.copy_out(block_ids(6, 5), blocks)
    with memory.lend(block_ids(1, 4)) as lent:
        for mine, theirs in zip(lent, blocks, strict=True):
            mine[:] = theirs
    assert memory.digest(EVERY, block_ids(1, 4)) == other.digest(EVERY, block_ids(6, 5))
    assert memory.read(EVERY, block_ids(1, 4)) == other.read(EVERY, block_ids(6, 5))
    other.close()


def test_whole_blocks_are_staged_a_few_at_a_time(memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.kv_pool.device_memory._STAGED_BYTES", 2 * GEOMETRY.block_bytes)
    fill(memory)
    sizes: list[int] = []
    read = memory.blocks.read

    def noted(planes: range, ids: list[BlockId]) -> Words:
        sizes.append(len(ids))
        words: Words = read(planes, ids)
        return words

    monkeypatch.setattr(memory.blocks, "read", noted)
    order = block_ids(9, 1, 4, 0, 7)
    copies = [np.empty((3, 2, GEOMETRY.plane_block_bytes), np.uint8) for _ in order]
    memory.copy_out(order, copies)
    assert sizes == [2, 2, 1]
    with memory.lend(order[::-1]) as lent:
        for mine, copy in zip(lent, copies, strict=True):
            mine[:] = copy
    swapped = [np.empty((3, 2, GEOMETRY.plane_block_bytes), np.uint8) for _ in order]
    memory.copy_out(order[::-1], swapped)
    assert all(np.array_equal(*pair) for pair in zip(copies, swapped, strict=True))


def test_host_memory_cannot_be_copied_from(memory: DeviceMemory) -> None:
    host = KVMemory.create(GEOMETRY, 10)
    for target, source in ((memory, host), (host, memory)):
        with pytest.raises(GeometryMismatchError, match="cannot be copied from"):
            target.copy_from(source, EVERY, block_ids(0), block_ids(0))
    host.close()


def test_any_bit_any_place_and_any_order_change_the_digest() -> None:
    words = np.random.default_rng(1).integers(-(1 << 62), 1 << 62, (4, 5, WORDS))
    known = fold(digest_blocks(words))
    for bit in (0, 1, 33, 62, 63):
        other = words.copy()
        other.view(np.uint64)[2, 3, WORDS - 1] ^= np.uint64(1 << bit)
        assert fold(digest_blocks(other)) != known
    for order in ([1, 0, 2, 3, 4], [0, 1, 2, 4, 3]):
        assert fold(digest_blocks(words[:, order])) != known
    swapped = words.copy()
    swapped[0, 0, [0, 1]] = swapped[0, 0, [1, 0]]
    assert fold(digest_blocks(swapped)) != known
    assert fold(digest_blocks(np.zeros((1, 1, 1), np.int64))) > 0


def test_a_block_has_the_same_digest_alone_and_among_many() -> None:
    """Blocks are mixed a piece at a time: of the second of these shapes, the last block is in the second piece."""
    for shape in ((2, 3, 5), (1, 33, 1024)):
        words = np.random.default_rng(4).integers(-(1 << 63), (1 << 63) - 1, shape)
        digests = digest_blocks(words)
        assert digests.shape == shape[:2]
        for plane, block in ((0, 0), (0, shape[1] - 1), (shape[0] - 1, 1)):
            assert int(digests[plane, block]) % (1 << 64) == digest_of(words[plane, block].tolist())


def digest_of(words: list[int]) -> int:
    """Return the digest of one block, by Python's integers."""
    total, every = 0, (1 << 64) - 1
    for place, word in enumerate(words):
        mixed = (word ^ ((place + 1) * 0x9E3779B97F4A7C15)) & every
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed = (mixed ^ (mixed >> 33)) * factor & every
        total += mixed ^ (mixed >> 33)
    return total & every


def test_work_of_a_busy_device_ends_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedBlocks, "latency_s", 3600.0)
    memory = DeviceMemory.create(GEOMETRY, 10, "simulated")
    monkeypatch.undo()
    other = open_pool(GEOMETRY, memory.handle)
    assert isinstance(other, DeviceMemory)
    copy = other.begin_copy(memory, EVERY, block_ids(1), block_ids(2))
    now, is_done = time.monotonic(), [copy.is_done]
    monkeypatch.setattr(time, "monotonic", lambda: now + 3601)
    assert [*is_done, copy.is_done] == [False, True]
    assert copy.wait() == memory.digest(EVERY, block_ids(1))
    other.close()
    memory.close()
