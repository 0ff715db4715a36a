"""Blocks on a GPU, with an interpreted kernel and doubles for the driver and for a framework's CUDA."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from support.ids import block_ids

from kvrelay.errors import ConfigError, DeviceError, PeerLostError
from kvrelay.kv_pool import cuda_blocks, device_memory
from kvrelay.kv_pool.block_digest import digest_blocks, fold
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.protocol.geometry import KVGeometry

GEOMETRY = KVGeometry(3, 2, 4, 8, "float16", "model")
EVERY = range(3)


class Driver:
    """CUDA's driver, with numpy's memory for the device's."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.opened: list[int] = []
        self.most_bytes = 1 << 20

    def allocate(self, size_bytes: int) -> int:
        if size_bytes > self.most_bytes:
            raise OSError(12, "the device has not that much memory left")
        made = np.zeros(size_bytes // 8 + 2, np.int64)
        address = -(-made.ctypes.data // 16) * 16
        self.memory[address] = made
        return address

    def export(self, address: int) -> bytes:
        return address.to_bytes(64, "little")

    def open(self, memory: bytes) -> int:
        address = int.from_bytes(memory, "little")
        if address not in self.memory:
            raise PeerLostError("cannot open the peer's CUDA memory: CUDA_ERROR_INVALID_VALUE")
        self.opened.append(address)
        return address

    def close(self, address: int) -> None:
        self.opened.remove(address)

    def free(self, address: int) -> None:
        del self.memory[address]


class Event:
    """An event that is over at once, unless ``fails``."""

    fails = False

    recorded = False

    def record(self, stream: Any) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.recorded

    def synchronize(self) -> None:
        if self.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Stream:
    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        pass


class Api:
    """A framework's CUDA. Only what it says is pinned memory may be given to kernels."""

    errors: tuple[type[Exception], ...] = (RuntimeError,)

    def start(self) -> None:
        pass

    def release_memory(self) -> None:
        pass

    def stream(self) -> Stream:
        return Stream()

    def event(self) -> Event:
        return Event()

    def on(self, stream: Stream) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.full(shape, -7, dtype)

    def tensor(self, memory: Any) -> Any:
        raise AssertionError("tensors are for engines")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect which frameworks are asked for."""
    asked: list[str] = []

    def api(name: str) -> Api:
        asked.append(name)
        return Api()

    monkeypatch.setattr(device_memory, "cuda_api", api)
    return asked


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> Driver:
    made = Driver()
    monkeypatch.setattr(cuda_blocks, "CudaDriver", lambda: made)
    return made


@pytest.fixture
def pools(driver: Driver) -> Iterator[tuple[DeviceMemory, DeviceMemory]]:
    """P's pool and D's, as P's node and D's messager have them."""
    own, target = (DeviceMemory.create(GEOMETRY, count, "cuda") for count in (10, 12))
    source = DeviceMemory.attach(GEOMETRY, msgspec.json.decode(msgspec.json.encode(own.handle), type=type(own.handle)))
    for first in range(0, 10, 5):
        blocks = block_ids(*range(first, first + 5))
        words = np.random.default_rng(first).integers(-(1 << 62), 1 << 62, (6, 5, GEOMETRY.plane_block_bytes // 8))
        own.write(EVERY, blocks, [words.view(np.uint8).data.cast("B")])
    yield source, target
    source.close()
    assert driver.opened == []
    own.close()
    target.close()
    assert driver.memory == {}


def test_blocks_are_copied_digested_read_and_written(pools: tuple[DeviceMemory, DeviceMemory]) -> None:
    source, target = pools
    sources, targets = block_ids(7, 1, 3), block_ids(11, 0, 5)
    copy = target.begin_copy(source, range(1, 3), targets, sources)
    assert copy.is_done
    assert copy.wait() == source.digest(range(1, 3), sources) == target.digest(range(1, 3), targets)
    assert target.read(range(1, 3), targets) == source.read(range(1, 3), sources)
    assert not target.blocks.read(range(2), targets).any(), "layer 0 was not asked for"
    untouched = [block for block in block_ids(*range(12)) if block not in targets]
    assert not target.blocks.read(range(6), untouched).any()


def test_digests_are_those_of_the_bytes_and_wait_for_the_engine(pools: tuple[DeviceMemory, DeviceMemory]) -> None:
    source, _ = pools
    blocks, written = block_ids(9, 0, 4), Event()
    noted = source.digest(EVERY, blocks)
    assert source.begin_digest(EVERY, blocks, after=written).wait() == noted
    assert source.blocks._stream.waited == [written]
    assert fold(digest_blocks(source.blocks.read(range(6), blocks))) == noted


def test_whole_blocks_go_out_and_come_in(pools: tuple[DeviceMemory, DeviceMemory]) -> None:
    source, target = pools
    copies = [np.empty((3, 2, GEOMETRY.plane_block_bytes), np.uint8) for _ in range(2)]
    source.copy_out(block_ids(8, 2), copies)
    with target.lend(block_ids(3, 6)) as lent:
        for mine, copy in zip(lent, copies, strict=True):
            mine[:] = copy
    assert target.read(EVERY, block_ids(3, 6)) == source.read(EVERY, block_ids(8, 2))
    assert target.digest(EVERY, block_ids(3, 6)) == source.digest(EVERY, block_ids(8, 2))


def test_errors_of_the_device_are_told_from_those_of_a_handle(
    pools: tuple[DeviceMemory, DeviceMemory], driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pools
    with pytest.raises(PeerLostError, match="INVALID_VALUE"):
        DeviceMemory.attach(GEOMETRY, msgspec.structs.replace(source.handle, memory=bytes(64)))
    driver.most_bytes = 1000
    with pytest.raises(ConfigError, match=r"cache.num_blocks: 100 blocks take 76,800 bytes: the device has not"):
        DeviceMemory.create(GEOMETRY, 100, "cuda")
    copy = target.begin_copy(source, EVERY, block_ids(0), block_ids(0))
    monkeypatch.setattr(Event, "fails", True)
    with pytest.raises(DeviceError, match="illegal memory access"):
        copy.wait()


def test_pinned_memory_is_kept_until_the_device_is_done(
    pools: tuple[DeviceMemory, DeviceMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is cut off asks for digests and never waits for them."""
    source, _ = pools
    monkeypatch.setattr(Event, "query", lambda self: False)
    for block in range(3):
        source.begin_digest(EVERY, block_ids(block))
    assert len(source.blocks._works) >= 3
    monkeypatch.undo()
    source.blocks._works.clear()


def test_each_process_uses_the_framework_of_its_own_node(driver: Driver, names: list[str]) -> None:
    own = DeviceMemory.create(GEOMETRY, 2, "cuda", "paddle")
    peer = DeviceMemory.attach(GEOMETRY, msgspec.structs.replace(own.handle, framework="torch"))
    messager = DeviceMemory.attach(GEOMETRY, own.handle)
    assert names == ["paddle", "torch", "paddle"]
    for pool in (messager, peer, own):
        pool.close()


def test_memory_is_given_back_if_nobody_is_left_to_close_it(driver: Driver) -> None:
    blocks = cuda_blocks.CudaBlocks.create((6, 10, 32), Api())
    assert driver.memory
    del blocks
    gc.collect()
    assert driver.memory == {}
