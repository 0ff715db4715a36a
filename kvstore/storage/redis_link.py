"""Redis access of the storage backends: pipelines of commands with one key each, to one server or a cluster.

redis-py handles connections and the protocol. The mapping of keys to cluster nodes is handled here, because with a dead
node the store must get the blocks of the other nodes without delay.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict, deque
from collections.abc import Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import MovedError, RedisError, ResponseError

from kvrelay.errors import StorageError, StorageUnavailableError
from kvrelay.protocol.block_hash import HASH_BYTES

Command: TypeAlias = tuple[bytes | str | int | memoryview, ...]
"""Name and arguments of a command; the first argument is its only key, a str."""

Address: TypeAlias = tuple[str, int]

T = TypeVar("T")

_LOST = (RedisError, OSError, RuntimeError)
"""Exceptions of redis-py for a server that does not answer; uvloop raises RuntimeError for a closed connection."""

_NUM_SLOTS = 16384
_HASH = re.compile(rf"[0-9a-f]{{{2 * HASH_BYTES}}}")

_MAX_PIPELINES = 4
"""Maximum concurrent pipelines, each on its own connection."""

_SCAN_COUNT = 1000


class RedisLink:
    """Connections to the Redis at ``url``, opened when needed and reopened when lost."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._seed: Redis | None = None
        self._nodes: dict[Address, Redis] = {}
        self._informants: deque[Redis] = deque()
        """All clients. The first is asked about the cluster."""
        self._slots: list[Redis] = []
        """In a cluster, the node of each slot."""
        self._is_known = False
        """Whether the kind of server is known, and no error has contradicted it since."""
        self._learning = asyncio.Lock()
        self._pipelines = asyncio.Semaphore(_MAX_PIPELINES)
        self.where = ""

    async def open(self) -> None:
        """Parse the URL; connect later. Raises StorageError if it is invalid."""
        try:
            parts = urlsplit(self._url)
            self._seed = self._client(ConnectionPool.from_url(self._url, **self._options(parts.scheme)))
        except ValueError as error:
            # The error text may contain the URL with its password.
            raise StorageError(f"storage.url cannot be read: {type(error).__name__}") from None
        self.where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Send ``commands`` in one pipeline and return a result for each; for a failed command, its exception.

        In a cluster each command goes to its key's node, in parallel. Raises StorageUnavailableError without an answer.
        """
        async with self._pipelines:
            results: list[Any] = [None] * len(commands)
            await self._run(commands, range(len(commands)), results)
            moved = [index for index, result in enumerate(results) if isinstance(result, MovedError)]
            if moved:
                await self._run(commands, moved, results)
        if results and all(_is_lost(result) for result in results):
            raise self._unavailable(results[0])
        return results

    async def keys(self, pattern: str) -> list[bytes]:
        """Return the keys that match ``pattern``, on all nodes. Raises StorageUnavailableError."""

        async def scan() -> list[bytes]:
            nodes = await self._all_nodes()
            return [key for node in nodes async for key in node.scan_iter(match=pattern, count=_SCAN_COUNT)]

        return await self._heeding(scan())

    async def block_hashes(self, prefix: str) -> list[bytes]:
        """Return the block hashes that follow ``prefix`` in keys; other keys are not ours. Raises as ``keys``."""
        names = [key[len(prefix) :].decode("latin-1") for key in await self.keys(prefix + "*")]
        return [bytes.fromhex(name) for name in names if _HASH.fullmatch(name)]

    async def max_memory_bytes(self) -> int | None:
        """Return Redis's memory limit in bytes, summed over all nodes; None without a limit. Raises as ``keys``."""

        async def ask() -> int:
            return sum([(await node.info("memory"))["maxmemory"] for node in await self._all_nodes()])

        return await self._heeding(ask()) or None

    async def close(self) -> None:
        """Close all connections."""
        self._seed = None
        while self._informants:
            await self._informants.pop().aclose()

    async def _heeding(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work`` and honour cancellation. Raises StorageUnavailableError if no server answers.

        redis-py may swallow a cancellation (on Python 3.11, in ``wait_for``), and the call would continue after its
        deadline. gather raises it regardless of the result of ``work``.
        """
        try:
            [result] = await asyncio.gather(work)
        except _LOST as error:
            raise self._unavailable(error) from error
        return result

    # ------------------------------------------------------------ pipelines

    async def _run(self, commands: Sequence[Command], indices: Sequence[int], results: list[Any]) -> None:
        if not self._is_known:
            await self._heeding(self._learn())
        groups: defaultdict[Redis, list[int]] = defaultdict(list)
        for index in indices:
            groups[self._node_of(str(commands[index][1]))].append(index)
        await asyncio.gather(*(self._run_at(node, commands, group, results) for node, group in groups.items()))

    async def _run_at(self, node: Redis, commands: Sequence[Command], group: list[int], results: list[Any]) -> None:
        pipeline = node.pipeline(transaction=False)
        for index in group:
            pipeline.execute_command(*commands[index])
        try:
            answers = await pipeline.execute(raise_on_error=False)
        except _LOST as error:
            answers = [error] * len(group)
        for index, answer in zip(group, answers, strict=True):
            results[index] = answer
            if isinstance(answer, MovedError) or _is_lost(answer):
                self._is_known = False

    # ------------------------------------------------------------ nodes

    def _node_of(self, key: str) -> Redis:
        return self._slots[key_slot(key.encode())] if self._slots else self._required_seed()

    async def _all_nodes(self) -> list[Redis]:
        await self._learn()
        return list(dict.fromkeys(self._slots)) or [self._required_seed()]

    async def _learn(self) -> None:
        """Detect whether this is a cluster and which node has which slot, if that may have changed."""
        async with self._learning:
            if self._is_known:
                return
            for attempt in range(1, len(self._informants) + 1):
                client = self._informants[0]
                self._informants.rotate(-1)  # first, so that the next call asks another if this one hangs
                try:
                    await self._learn_from(client)
                except _LOST:
                    if attempt == len(self._informants):
                        raise
                else:
                    self._informants.rotate(1)
                    return

    async def _learn_from(self, client: Redis) -> None:
        info = await client.info("cluster")
        if info.get("cluster_enabled"):
            self._slots = await self._slots_by(client)
        self._is_known = True

    async def _slots_by(self, client: Redis) -> list[Redis]:
        """Return the node of each slot according to ``client``; ``client`` itself for unassigned slots."""
        slots = [client] * _NUM_SLOTS
        for first, last, primary, *_ in await client.execute_command("CLUSTER", "SLOTS"):  # type: ignore[no-untyped-call]
            host, port = primary[0].decode(), primary[1]
            node = self._node_at((host, port)) if host else client
            slots[first : last + 1] = [node] * (last + 1 - first)
        return slots

    def _node_at(self, address: Address) -> Redis:
        if address not in self._nodes:
            seed = self._required_seed().connection_pool
            options = {**seed.connection_kwargs, "host": address[0], "port": address[1]}
            self._nodes[address] = self._client(ConnectionPool(connection_class=seed.connection_class, **options))
        return self._nodes[address]

    def _required_seed(self) -> Redis:
        if self._seed is None:
            raise StorageUnavailableError("the connection to Redis is closed")
        return self._seed

    def _client(self, pool: ConnectionPool) -> Redis:
        client = Redis.from_pool(pool)
        self._informants.append(client)
        return client

    def _options(self, scheme: str) -> dict[str, Any]:
        # Well before the call's deadline, so that the answers of the other nodes are still used.
        limits = {"socket_timeout": self._timeout_s / 3, "socket_connect_timeout": self._timeout_s / 3}
        keepalive = {} if scheme == "unix" else {"socket_keepalive": True}
        return {"protocol": 3, "retry": Retry(NoBackoff(), 0), **limits, **keepalive}

    def _unavailable(self, error: BaseException) -> StorageUnavailableError:
        return StorageUnavailableError(f"Redis at {self.where}: {type(error).__name__}: {error}")


def _is_lost(result: object) -> bool:
    """Whether ``result`` means that a server did not answer."""
    return isinstance(result, _LOST) and not isinstance(result, ResponseError)
