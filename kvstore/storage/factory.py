"""From the config to a store. Loads the library of a backend only if that backend is wanted."""

from __future__ import annotations

from pathlib import Path

from kvrelay.core.clock import Clock
from kvrelay.core.config_sections import StorageConfig
from kvrelay.core.errors import LocalProtocolError
from kvrelay.core.geometry import KVGeometry
from kvstore.storage.backend import Backend
from kvstore.storage.block_format import BlockFormat
from kvstore.storage.interface import KVStore
from kvstore.storage.store import Store


def make_store(config: StorageConfig, geometry: KVGeometry, clock: Clock, host: str = "127.0.0.1") -> KVStore:
    """Return the store that ``config`` describes, for the blocks of ``geometry``. Not open yet.

    ``host`` is where other nodes reach this one.
    """
    return Store(_make_backend(config, geometry, clock, host), geometry, config.timeout_s, clock)


def _make_backend(config: StorageConfig, geometry: KVGeometry, clock: Clock, host: str) -> Backend:
    match config.backend:
        case "none":
            from kvstore.storage.none import NoBackend

            return NoBackend()
        case "memory":
            from kvstore.storage.memory import MemoryBackend

            return MemoryBackend(geometry, config.capacity, config.timeout_s)
        case "redis" if config.payload == "owner":
            return _make_owner(config, geometry, clock, host)
        case "redis":
            from kvstore.storage.redis_store import RedisBackend

            return RedisBackend(geometry, _url(config), config.ttl_s, config.timeout_s)
        case "mooncake":
            from kvstore.storage.mooncake_store import MooncakeBackend

            return MooncakeBackend(geometry, config.master, host, config.capacity, config.timeout_s)
        case _:
            from kvstore.storage.file_store import FileBackend

            return FileBackend(geometry, Path(config.path), config.capacity, config.timeout_s, clock)


def _make_owner(config: StorageConfig, geometry: KVGeometry, clock: Clock, host: str) -> Backend:
    from kvstore.storage.file_store import FileBackend
    from kvstore.storage.owner_store import OwnerBackend
    from kvstore.storage.redis_link import RedisLink

    root = Path(config.path)
    return OwnerBackend(
        BlockFormat(geometry),
        FileBackend(geometry, root, config.capacity, config.timeout_s, clock),
        RedisLink(_url(config), config.timeout_s),
        root=root,
        host=host,
        ttl_s=config.ttl_s,
        timeout_s=config.timeout_s,
    )


def _url(config: StorageConfig) -> str:
    if config.url is None:
        raise LocalProtocolError("a redis store without a url got past the config's checks")
    return config.url.get_secret_value()
