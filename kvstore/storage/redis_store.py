"""Backend ``redis``: values in Redis or Valkey, one key per block, with a time to live after the last use."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import numpy as np

from kvrelay.errors import StorageUnavailableError
from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.batches import batches
from kvstore.storage.block_format import BlockFormat, Value
from kvstore.storage.calls import Delivery, GetCall, PutCall
from kvstore.storage.interface import PutOutcome, StoreCounters, StoreStats, VerifyReport
from kvstore.storage.redis_link import RedisLink
from kvstore.storage.threads import BlockingThreads

KEY_PREFIX = "kvrelay:kv:"
"""Prefix of all keys, followed by the namespace, a colon and the block hash, in hex. In a cluster the keys spread over
all slots, because each command has one key."""

_PIPELINE_BYTES = 4 << 20
_PIPELINE_KEYS = 64
"""Maximum bytes and keys per pipeline, so that building and sending one takes the loop at most a millisecond."""

logger = logging.getLogger(__name__)


class RedisBackend:
    """Values at ``url``. Redis deletes blocks not used for ``ttl_s`` and, when full, by its own policy."""

    def __init__(self, geometry: KVGeometry, url: str, ttl_s: int, timeout_s: float) -> None:
        self.counters = StoreCounters()
        self._format = BlockFormat(geometry)
        self._prefix = f"{KEY_PREFIX}{self._format.namespace.hex()}:"
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._link = RedisLink(url, timeout_s)
        self._threads = BlockingThreads("kv-redis")
        self._refusing = False
        self._num_blocks = max(1, min(_PIPELINE_KEYS, _PIPELINE_BYTES // self._format.value_bytes))

    async def open(self) -> None:
        """Connect, now or when the server is available. Raises StorageError if the URL is invalid."""
        await self._link.open()
        with contextlib.suppress(StorageUnavailableError):  # reported when the store is used
            await self._link.run([("EXISTS", self._key(bytes(32)))])

    async def put(self, call: PutCall) -> None:
        """Renew the stored blocks, then send the others, pipeline by pipeline."""
        for keys in batches(range(len(call.block_hashes)), _PIPELINE_KEYS):
            renewed = await self._link.run([("EXPIRE", self._key(call.block_hashes[i]), self._ttl_s) for i in keys])
            missing = []
            for index, present in zip(keys, renewed, strict=True):
                if _is_one(present):
                    call.outcomes[index] = PutOutcome.PRESENT
                else:
                    missing.append(index)
            for step in batches(missing, self._num_blocks):
                await self._put_step(call, step)

    async def _put_step(self, call: PutCall, step: Sequence[int]) -> None:
        packed = await self._threads.write(lambda: self._pack(call, step))
        commands = [
            ("SET", self._key(call.block_hashes[index]), value.data, "EX", self._ttl_s) for index, value in packed
        ]
        results = await self._link.run(commands)
        for (index, _), result in zip(packed, results, strict=True):
            if not isinstance(result, Exception):
                call.outcomes[index] = PutOutcome.WRITTEN
        self._complain([result for result in results if isinstance(result, Exception)])

    def _pack(self, call: PutCall, step: Sequence[int]) -> list[tuple[int, Value]]:
        # New memory for each value: a dropped connection may still reference the old.
        values = [(index, np.empty(self._format.value_bytes, np.uint8)) for index in step]
        return [(index, value) for index, value in values if call.pack(index, value)]

    async def get(self, call: GetCall) -> None:
        """Fetch pipeline by pipeline. Each is verified while the next is transferred."""
        checking: asyncio.Task[None] | None = None
        try:
            for step in batches(range(len(call.block_hashes)), self._num_blocks):
                fetched = await self._fetch([call.block_hashes[index] for index in step])
                if checking is not None:
                    await checking
                checking = asyncio.create_task(self._check(call, step, fetched))
            if checking is not None:
                await checking
        finally:
            if checking is not None:
                checking.cancel()

    async def _fetch(self, block_hashes: Sequence[bytes]) -> list[Value | None]:
        commands = [("GETEX", self._key(block_hash), "EX", self._ttl_s) for block_hash in block_hashes]
        results = await self._link.run(commands)
        return [np.frombuffer(result, np.uint8) if isinstance(result, bytes) else None for result in results]

    async def _check(self, call: GetCall, step: Sequence[int], values: list[Value | None]) -> None:
        def deliver() -> list[bytes]:
            found = [(index, value) for index, value in zip(step, values, strict=True) if value is not None]
            return [call.block_hashes[i] for i, value in found if call.deliver(i, value) is Delivery.BAD]

        await self._drop_corrupt(await self._threads.read(deliver))

    async def _drop_corrupt(self, block_hashes: Sequence[bytes]) -> int:
        self.counters.corrupt_blocks += len(block_hashes)
        return await self.delete(block_hashes)

    async def contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
        return [
            _is_one(result) for result in await self._link.run([("EXISTS", self._key(one)) for one in block_hashes])
        ]

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        """Unlink the keys; Redis frees their memory in the background."""
        num_deleted = 0
        for step in batches(block_hashes, _PIPELINE_KEYS):
            num_deleted += sum(map(_is_one, await self._link.run([("UNLINK", self._key(one)) for one in step])))
        return num_deleted

    async def clear(self) -> int:
        """Unlink all keys of this geometry."""
        return await self.delete(await self._block_hashes())

    async def stats(self) -> StoreStats:
        """Count the keys of this geometry."""
        num_blocks = len(await self._block_hashes())
        capacity_bytes = await self._link.max_memory_bytes()
        return StoreStats("redis", num_blocks, num_blocks * self._format.value_bytes, capacity_bytes)

    async def verify(self) -> VerifyReport:
        """Fetch every value."""
        block_hashes, corrupt = await self._block_hashes(), list[bytes]()
        for step in batches(block_hashes, self._num_blocks):
            for block_hash, value in zip(step, await self._fetch(step), strict=True):
                if value is not None and not self._format.is_good(value, block_hash):
                    corrupt.append(block_hash)
        return VerifyReport(len(block_hashes), await self._drop_corrupt(corrupt))

    async def close(self) -> None:
        """Close the connections; the blocks in Redis are kept."""
        await self._link.close()
        await self._threads.close(self._timeout_s)

    def _key(self, block_hash: bytes) -> str:
        return self._prefix + block_hash.hex()

    async def _block_hashes(self) -> list[bytes]:
        """Return all blocks of this geometry. Scans every key of the server."""
        return await self._link.block_hashes(self._prefix)

    def _complain(self, errors: Sequence[Exception]) -> None:
        """Count blocks that Redis rejects; log only the first time until a pipeline succeeds completely."""
        self.counters.errors += len(errors)
        if errors and not self._refusing:
            logger.warning("Redis at %s cannot store KV: %s", self._link.where, errors[0])
        self._refusing = bool(errors)


def _is_one(result: object) -> bool:
    return not isinstance(result, Exception) and result == 1
