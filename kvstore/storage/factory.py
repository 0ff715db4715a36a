"""Creates the store of a config. Imports the library of a backend only if it is used."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import assert_never

from kvrelay.config.storage import StorageConfig
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.clock import Clock
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.runtime.keys import Keys
from kvstore.storage.backend import Backend, LocalBackend
from kvstore.storage.block_format import BlockFormat, namespace_of
from kvstore.storage.interface import KVStore
from kvstore.storage.store import Store


def make_store(
    config: StorageConfig,
    geometry: KVGeometry,
    clock: Clock,
    host: str = "127.0.0.1",
    keys: Keys | None = None,
    delay: Callable[[], Awaitable[None]] | None = None,
) -> KVStore:
    """Return the store that ``config`` describes, for the blocks of ``geometry``. Not open yet.

    ``host``: the address of this node for other nodes. ``keys``: its keys for connections to them.
    ``delay``: as for ``Store``.
    """
    return Store(_make_backend(config, geometry, clock, host, keys), geometry, config.timeout_s, clock, delay)


def make_existing_store(config: StorageConfig, geometry: KVGeometry, clock: Clock, keys: Keys | None = None) -> KVStore:
    """Return the existing store, for ``kvrelay store``. Not open yet; opening it creates nothing."""
    backend = _make_backend(config, geometry, clock, "127.0.0.1", keys, as_is=True)
    return Store(backend, geometry, config.timeout_s, clock)


def _make_backend(
    config: StorageConfig, geometry: KVGeometry, clock: Clock, host: str, keys: Keys | None, *, as_is: bool = False
) -> Backend:
    match config.backend:
        case "none":
            from kvstore.storage.none import NoBackend

            return NoBackend()
        case "memory":
            from kvstore.storage.memory import MemoryBackend

            return MemoryBackend(geometry, config.capacity, config.timeout_s)
        case "redis" if config.payload == "owner":
            return _make_owner(config, geometry, clock, host, keys, as_is=as_is)
        case "redis":
            from kvstore.storage.redis_store import RedisBackend

            return RedisBackend(geometry, _url(config), config.ttl_s, config.timeout_s)
        case "mooncake":
            from kvstore.storage.mooncake_store import MooncakeBackend

            capacity_bytes = 0 if as_is else config.capacity
            return MooncakeBackend(geometry, config.master, host, capacity_bytes, config.timeout_s)
        case "file":
            return _make_file(config, geometry, clock, as_is=as_is)
        case unknown:
            assert_never(unknown)


def _make_file(config: StorageConfig, geometry: KVGeometry, clock: Clock, *, as_is: bool) -> LocalBackend:
    from kvstore.storage.file_directory import is_laid_out
    from kvstore.storage.file_store import FileBackend
    from kvstore.storage.none import NoBackend

    path = Path(config.path)
    if as_is and not is_laid_out(path, namespace_of(geometry)):
        return NoBackend("file")
    return FileBackend(geometry, path, config.capacity, config.timeout_s, clock, as_is=as_is)


def _make_owner(
    config: StorageConfig, geometry: KVGeometry, clock: Clock, host: str, keys: Keys | None, *, as_is: bool
) -> Backend:
    from kvstore.storage.owner_store import OwnerBackend
    from kvstore.storage.redis_link import RedisLink

    return OwnerBackend(
        BlockFormat(geometry),
        _make_file(config, geometry, clock, as_is=as_is),
        RedisLink(_url(config), config.timeout_s),
        root=Path(config.path),
        host=host,
        ttl_s=config.ttl_s,
        timeout_s=config.timeout_s,
        as_is=as_is,
        keys=keys,
    )


def _url(config: StorageConfig) -> str:
    if config.url is None:
        raise LocalProtocolError("a redis store without a url got past the config's checks")
    return config.url.get_secret_value()
