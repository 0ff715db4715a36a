"""Places to keep KV in, for the tests that hold for every backend: how to open a store there, and how to spoil it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import redis
from mooncake_master import CAPACITY_BYTES, MooncakeMaster
from pydantic import SecretStr
from support.redis_server import RedisServer

from kvrelay.config.storage import StorageConfig
from kvrelay.machine.clock import Clock
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.block_format import BlockFormat, Value, namespace_of
from kvstore.storage.factory import make_store
from kvstore.storage.file_store import FileBackend
from kvstore.storage.interface import BlockView, KVStore
from kvstore.storage.memory import MemoryBackend
from kvstore.storage.store import Store

GEOMETRY = KVGeometry(3, 2, 4, 2, "float16", "model digest")
TIMEOUT_S = 10.0

HASHES = BlockHasher(GEOMETRY.model_digest, 1).hashes(range(1000))


def planes(num_blocks: int, seed: int | None = 0, geometry: KVGeometry = GEOMETRY) -> BlockView:
    """Return a pool as ``KVMemory.planes``: zeros without a seed, else block i the same in pools of any size."""
    if seed is None:
        return np.zeros((geometry.num_layers, 2, num_blocks, geometry.plane_block_bytes), np.uint8)
    shape = (num_blocks, geometry.num_layers, 2, geometry.plane_block_bytes)
    blocks = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return np.moveaxis(blocks, 0, 2).copy()


def views(pool: BlockView, block_ids: Sequence[int] | None = None) -> list[BlockView]:
    """Return the blocks of ``pool``, as a node lends them to a store."""
    return [pool[:, :, block] for block in (range(pool.shape[2]) if block_ids is None else block_ids)]


class HandClock(Clock):
    """Time that stands still until a test moves it."""

    now_s = 1000.0

    def now(self) -> float:
        return self.now_s


class Room(Protocol):
    """Where the stores of one test keep their blocks."""

    shared: bool
    """Whether two stores see each other's blocks."""
    lasting: bool
    """Whether blocks are kept when nobody has the store open."""
    listable: bool
    """Whether a store knows all that it holds."""

    def store(self, geometry: KVGeometry = GEOMETRY, num_blocks: int = 100) -> KVStore:
        """Return a store with room for ``num_blocks``, not open yet."""

    async def read(self, store: KVStore, block_hash: bytes) -> Value:
        """Return a value as it is stored."""

    async def write(self, store: KVStore, block_hash: bytes, value: Value) -> None:
        """Put another value in place of the one of ``block_hash``, behind the backs of all stores."""


def backend_of(store: KVStore) -> Any:
    assert isinstance(store, Store)
    return store._backend


class MemoryRoom:
    shared = False
    lasting = False
    listable = True

    def store(self, geometry: KVGeometry = GEOMETRY, num_blocks: int = 100) -> KVStore:
        capacity = num_blocks * BlockFormat(geometry).value_bytes
        # not through the config: its capacity is at least 64 KiB
        return Store(MemoryBackend(geometry, capacity, TIMEOUT_S), geometry, TIMEOUT_S, Clock())

    async def read(self, store: KVStore, block_hash: bytes) -> Value:
        value: Value = backend_of(store)._values[backend_of(store)._index[block_hash]].copy()
        return value

    async def write(self, store: KVStore, block_hash: bytes, value: Value) -> None:
        stored = backend_of(store)._values[backend_of(store)._index[block_hash]]
        stored[:] = 0
        stored[: len(value)] = value


class FileRoom:
    shared = True
    lasting = True
    listable = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.namespace = namespace_of(GEOMETRY).hex()

    def store(self, geometry: KVGeometry = GEOMETRY, num_blocks: int = 100) -> KVStore:
        slot_bytes = -(-BlockFormat(geometry).value_bytes // 4096) * 4096
        capacity = 4096 + num_blocks * (slot_bytes + 64)
        backend = FileBackend(geometry, self.path, capacity, TIMEOUT_S, Clock())
        return Store(backend, geometry, TIMEOUT_S, Clock())

    async def read(self, store: KVStore, block_hash: bytes) -> Value:
        return self._read_from(backend_of(store), block_hash)

    async def write(self, store: KVStore, block_hash: bytes, value: Value) -> None:
        self._write_to(backend_of(store), block_hash, value)

    def _read_from(self, backend: FileBackend, block_hash: bytes) -> Value:
        value, place = np.empty(backend._format.value_bytes, np.uint8), backend._index.find(block_hash)
        assert place is not None
        assert backend._slabs.read(place.slot, value)
        return value

    def _write_to(self, backend: FileBackend, block_hash: bytes, value: Value) -> None:
        whole, place = np.zeros(backend._format.value_bytes, np.uint8), backend._index.find(block_hash)
        whole[: len(value)] = value
        assert place is not None
        assert backend._slabs.write(place.slot, whole)


class RedisRoom:
    """A Redis server, or a cluster of them."""

    shared = True
    lasting = True
    listable = True

    def __init__(self, client: redis.Redis | redis.RedisCluster, url: str) -> None:
        self.url = url
        self._client = client
        client.flushall()

    def store(self, geometry: KVGeometry = GEOMETRY, num_blocks: int = 100) -> KVStore:
        return configured(StorageConfig(backend="redis", url=SecretStr(self.url), timeout_s=TIMEOUT_S), geometry)

    async def read(self, store: KVStore, block_hash: bytes) -> Value:
        value = self._client.get(backend_of(store)._key(block_hash))
        assert isinstance(value, bytes)
        return np.frombuffer(value, np.uint8).copy()

    async def write(self, store: KVStore, block_hash: bytes, value: Value) -> None:
        self._client.set(backend_of(store)._key(block_hash), value.tobytes())


class OwnerRoom(FileRoom):
    """Hosts with a directory each, which find each other's blocks through Redis."""

    lasting = False

    def __init__(self, path: Path, server: RedisServer) -> None:
        super().__init__(path)
        self._server = server
        self._num_hosts = 0
        with server.client() as client:
            client.flushall()

    def store(self, geometry: KVGeometry = GEOMETRY, num_blocks: int = 100) -> KVStore:
        self._num_hosts += 1
        return self.host(self._num_hosts, geometry)

    def host(self, number: int, geometry: KVGeometry = GEOMETRY, timeout_s: float = TIMEOUT_S) -> KVStore:
        url, path = SecretStr(self._server.url), str(self.path / f"host{number}")
        config = StorageConfig(
            backend="redis", url=url, payload="owner", path=path, capacity=8 << 20, timeout_s=timeout_s
        )
        return configured(config, geometry)

    async def read(self, store: KVStore, block_hash: bytes) -> Value:
        return self._read_from(backend_of(store)._local, block_hash)

    async def write(self, store: KVStore, block_hash: bytes, value: Value) -> None:
        self._write_to(backend_of(store)._local, block_hash, value)


class MooncakeRoom:
    """The store of one Mooncake master."""

    shared = True
    lasting = False
    listable = False

    def __init__(self, master: MooncakeMaster) -> None:
        self._master = master

    def store(self, geometry: KVGeometry = GEOMETRY, num_blocks: int = 100) -> KVStore:
        config = StorageConfig(
            backend="mooncake", master=self._master.address, capacity=CAPACITY_BYTES, timeout_s=TIMEOUT_S
        )
        return make_store(config, geometry, Clock())

    async def read(self, store: KVStore, block_hash: bytes) -> Value:
        return np.frombuffer(backend_of(store)._client.get(self._key(store, block_hash)), np.uint8).copy()

    async def write(self, store: KVStore, block_hash: bytes, value: Value) -> None:
        client, key = backend_of(store)._client, self._key(store, block_hash)
        assert client.remove(key, force=True) == 0
        assert client.put(key, value.tobytes()) == 0

    def _key(self, store: KVStore, block_hash: bytes) -> str:
        return f"{backend_of(store)._prefix}{block_hash.hex()}"


def configured(config: StorageConfig, geometry: KVGeometry) -> KVStore:
    return make_store(config, geometry, Clock())
