"""The entries of all nodes of a cluster, in Redis.

A key per node, which expires with the node's lease unless it is renewed, and a set of their names, so that routers need
not scan a Redis with many other keys. All are in one slot of a Redis Cluster.
"""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MovedError, RedisError

from kvrelay.config.sections import RegistryConfig
from kvrelay.errors import ConfigError, LocalProtocolError, RegistryError, RemoteProtocolError
from kvrelay.protocol.ids import PeerId
from kvrelay.registry.node_entry import NodeEntry, pack_entry, unpack_entry

_MAX_TIMEOUT_S = 2.0
_MAX_REASON = 200
_MAX_REPORTED = 100

logger = logging.getLogger(__name__)


class RedisRegistry:
    """The Registry in the Redis at ``config.url``."""

    def __init__(self, config: RegistryConfig) -> None:
        self._config = config
        prefix = f"kvrelay:{{registry:{config.cluster}}}"
        self._names_key = f"{prefix}:nodes"
        self._entry_key = f"{prefix}:node:"
        self._lease_ms = max(1, round(config.lease_s * 1000))
        self._pool: ConnectionPool | None = None
        self._client: Redis | None = None
        self._unreadable: set[bytes] = set()
        self.where = ""

    def open(self) -> None:
        """Parse the URL; connect later. Raises ConfigError if it is invalid."""
        url = self._config.url.get_secret_value() if self._config.url else ""
        timeout_s = min(_MAX_TIMEOUT_S, self._config.lease_s / 3)
        options: dict[str, Any] = {
            "protocol": 3,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
        }
        try:
            parts = urlsplit(url)
            self._pool = ConnectionPool.from_url(url, **options)
        except ValueError as error:
            # Its text may quote the URL, and the URL the password.
            raise ConfigError([f"registry.url: cannot be read: {type(error).__name__}"]) from None
        self._client = Redis(connection_pool=self._pool)
        self.where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    async def publish(self, entry: NodeEntry) -> None:
        """Write ``entry`` and renew its lease."""
        await self._run(
            ("SET", self._entry_key + entry.peer, pack_entry(entry), "PX", self._lease_ms),
            ("SADD", self._names_key, entry.peer),
        )

    async def withdraw(self, peer: PeerId) -> None:
        """Remove the entry of ``peer``."""
        await self._run(("DEL", self._entry_key + peer), ("SREM", self._names_key, peer))

    async def entries(self) -> list[NodeEntry]:
        """Return the entries of all nodes whose leases have not expired, without invalid ones."""
        [names] = await self._run(("SMEMBERS", self._names_key))
        ordered: list[bytes] = sorted(names)
        if not ordered:
            return []
        [values] = await self._run(("MGET", *(self._entry_key.encode() + name for name in ordered)))
        ended = [name for name, value in zip(ordered, values, strict=True) if value is None]
        if ended:
            # One that is renewed just now is named again with the next renewal.
            await self._run(("SREM", self._names_key, *ended))
        return [
            entry
            for name, value in zip(ordered, values, strict=True)
            if value is not None and (entry := self._unpacked(name, value)) is not None
        ]

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._go_home()
            await self._client.aclose()
        if self._pool is not None:
            await self._pool.disconnect()
        self._client = self._pool = None

    # ------------------------------------------------------------ Redis

    async def _run(self, *commands: tuple[object, ...]) -> list[Any]:
        """Run ``commands`` in one transaction; return their results."""
        try:
            try:
                return await self._transaction(commands)
            except MovedError as moved:
                await self._go_to(moved.host, moved.port)
                return await self._transaction(commands)
        except (RedisError, OSError, RuntimeError) as error:  # RuntimeError: uvloop's, of a connection just closed
            await self._go_home()
            raise RegistryError(f"Redis at {self.where}: {type(error).__name__}: {error!s:.{_MAX_REASON}}") from error

    async def _transaction(self, commands: tuple[tuple[object, ...], ...]) -> list[Any]:
        if self._client is None:
            raise LocalProtocolError("the registry is not open")
        async with self._client.pipeline(transaction=True) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute()
        return answers

    async def _go_to(self, host: str, port: int) -> None:
        """Use the node of a Redis Cluster that has the slot of all keys."""
        await self._go_home()
        if self._pool is not None:
            options = {**self._pool.connection_kwargs, "host": host, "port": port}
            pool = ConnectionPool(connection_class=self._pool.connection_class, **options)
            self._client = Redis.from_pool(pool)

    async def _go_home(self) -> None:
        """Use the server of the URL."""
        if self._client is not None and self._pool is not None and self._client.connection_pool is not self._pool:
            await self._client.aclose()
            self._client = Redis(connection_pool=self._pool)

    def _unpacked(self, name: bytes, value: bytes) -> NodeEntry | None:
        try:
            return unpack_entry(value)
        except RemoteProtocolError as error:
            if name not in self._unreadable and len(self._unreadable) < _MAX_REPORTED:
                self._unreadable.add(name)
                logger.warning("registry entry %.100r cannot be read: %.200s", name, error.message)
            return None
