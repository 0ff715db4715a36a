"""Backend ``redis`` with ``payload: owner``: values stay on the host that wrote them; Redis has their location.

Each host keeps its values in a ``file`` store, and its processes serve them to other hosts. In Redis there are::

    kvrelay:at:<namespace>:<block hash>  ->  id of the owner, for ``ttl_s`` after the last use
    kvrelay:owner:<id>:<namespace>       ->  address of a process that serves what the owner holds, for a few seconds

The id belongs to the directory, so locations stay valid when a host's processes restart at other addresses. A location
in Redis is a hint: if the owner does not have the block, it is a miss and the location is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from kvrelay.errors import StorageError, StorageUnavailableError
from kvrelay.runtime.keys import Keys
from kvstore.storage.backend import LocalBackend
from kvstore.storage.batches import batches
from kvstore.storage.block_exchange import BlockExchange
from kvstore.storage.block_format import BlockFormat, Value
from kvstore.storage.calls import Delivery, GetCall, PutCall
from kvstore.storage.interface import PutOutcome, StoreStats, VerifyReport
from kvstore.storage.redis_link import Command, RedisLink
from kvstore.storage.threads import BlockingThreads

_ANNOUNCE_S = 5.0
_ADDRESS_TTL_S = 15
"""Seconds until the address of an owner without running processes expires."""

_FETCH_BYTES = 4 << 20
_BATCH_KEYS = 64

logger = logging.getLogger(__name__)


class OwnerBackend:
    """Values in ``local``, found by all hosts through ``link``. ``host``: the address of this host for others.
    ``keys``: keys for connections to them.

    ``as_is``: only to inspect and clear existing blocks; this process serves no others.
    """

    def __init__(
        self,
        block_format: BlockFormat,
        local: LocalBackend,
        link: RedisLink,
        *,
        root: Path,
        host: str,
        ttl_s: int,
        timeout_s: float,
        as_is: bool = False,
        keys: Keys | None = None,
    ) -> None:
        self.counters = local.counters
        self._format = block_format
        self._prefix = f"kvrelay:at:{block_format.namespace.hex()}:"
        self._local = local
        self._link = link
        self._root = root
        self._as_is = as_is
        self._host = host
        self._ttl_s = ttl_s
        self._fetch_timeout_s = timeout_s / 3
        self._timeout_s = timeout_s
        self._exchange = BlockExchange(block_format.namespace, local, keys)
        self._threads = BlockingThreads("kv-owner")
        self._owner = ""
        self._announcing: asyncio.Task[None] | None = None
        self._fetch_blocks = max(1, min(_BATCH_KEYS, _FETCH_BYTES // block_format.value_bytes))

    async def open(self) -> None:
        """Open the files, serve them, and announce this in Redis from now on. Raises StorageError like FileBackend."""
        await self._link.open()
        await self._local.open()
        address = self._exchange.open(self._host)
        if self._as_is:
            self._owner = await self._threads.write(lambda: _known_owner_id(self._root))
            return
        self._owner = await self._threads.write(lambda: _owner_id(self._root))
        with contextlib.suppress(StorageUnavailableError):  # reported when the store is used
            await self._announce(address)
        self._announcing = asyncio.create_task(self._keep_announcing(address))

    async def _announce(self, address: str) -> None:
        await self._link.run([("SET", self._address_key(self._owner), address, "EX", _ADDRESS_TTL_S)])

    async def _keep_announcing(self, address: str) -> None:
        while True:
            await asyncio.sleep(_ANNOUNCE_S)
            try:
                await self._announce(address)
            except StorageUnavailableError as error:
                logger.debug("cannot announce this host's blocks: %s", error.message)

    # ------------------------------------------------------------ blocks

    async def put(self, call: PutCall) -> None:
        """Write the blocks that no host has to the local files, then record their location."""
        for batch in batches(range(len(call.block_hashes)), _BATCH_KEYS):
            owners = await self._owners([call.block_hashes[index] for index in batch])
            elsewhere = [index for index, owner in zip(batch, owners, strict=True) if owner not in ("", self._owner)]
            for index in elsewhere:
                call.outcomes[index] = PutOutcome.PRESENT
            here = sorted(set(batch) - set(elsewhere))
            part = call.part(here)
            await self._local.put(part)
            kept = {
                index: done for index, done in zip(here, part.outcomes, strict=True) if done is not PutOutcome.FAILED
            }
            await self._link.run([self._location(call.block_hashes[index]) for index in kept])
            for index, outcome in kept.items():
                call.outcomes[index] = outcome

    async def get(self, call: GetCall) -> None:
        """Read blocks in the local files, then fetch the rest from all owners in parallel."""
        await self._local.get(call)
        for batch in batches([index for index, hit in enumerate(call.hits) if not hit], _BATCH_KEYS):
            by_owner: defaultdict[str, list[int]] = defaultdict(list)
            owners = await self._owners([call.block_hashes[index] for index in batch])
            for index, owner in zip(batch, owners, strict=True):
                if owner:
                    by_owner[owner].append(index)
            await asyncio.gather(*(self._get_from(owner, call, indices) for owner, indices in by_owner.items()))

    async def _get_from(self, owner: str, call: GetCall, indices: list[int]) -> None:
        if owner == self._owner:  # stale location: local blocks were already found
            await self._forget([call.block_hashes[index] for index in indices])
            return
        address = await self._address(owner)
        if address is None:  # keep the locations: the owner may come back with its files
            return
        for batch in batches(indices, self._fetch_blocks):
            block_hashes = [call.block_hashes[index] for index in batch]
            try:
                values = await self._exchange.fetch(address, block_hashes, self._fetch_timeout_s)
            except StorageUnavailableError as error:
                self.counters.errors += 1
                logger.warning("cannot fetch KV: %s", error.message)
                return
            await self._deliver(call, batch, values)

    async def _deliver(self, call: GetCall, batch: Sequence[int], values: list[Value | None]) -> None:
        def deliver() -> list[Delivery | None]:
            found = zip(batch, values, strict=True)
            return [None if value is None else call.deliver(index, value) for index, value in found]

        deliveries = await self._threads.read(deliver)
        self.counters.corrupt_blocks += deliveries.count(Delivery.BAD)
        done = zip(batch, deliveries, strict=True)
        await self._forget([call.block_hashes[index] for index, delivery in done if delivery in (None, Delivery.BAD)])

    async def contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
        """Check the local files and, for the rest, Redis."""
        present = await self._local.contains(block_hashes)
        for batch in batches([index for index, here in enumerate(present) if not here], _BATCH_KEYS):
            owners = await self._owners([block_hashes[index] for index in batch])
            for index, owner in zip(batch, owners, strict=True):
                present[index] = owner not in ("", self._owner)
        return present

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        """Have each block deleted by its owner, and delete its location."""
        num_deleted = 0
        for batch in batches(block_hashes, _BATCH_KEYS):
            by_owner: defaultdict[str, list[bytes]] = defaultdict(list)
            for block_hash, owner in zip(batch, await self._owners(batch), strict=True):
                by_owner[owner or self._owner].append(block_hash)
            await self._forget(batch)
            num_deleted += sum([await self._drop_at(owner, held) for owner, held in by_owner.items()])
        return num_deleted

    async def _drop_at(self, owner: str, block_hashes: list[bytes]) -> int:
        if owner == self._owner:
            return await self._local.delete(block_hashes)
        address = await self._address(owner)
        return await self._exchange.drop(address, block_hashes, self._fetch_timeout_s) if address else 0

    # ------------------------------------------------------------ for operators

    async def clear(self) -> int:
        """Delete all blocks of this geometry, here and at all reachable owners."""
        num_deleted = await self.delete(await self._block_hashes())
        return num_deleted + await self._local.clear()

    async def stats(self) -> StoreStats:
        """Count the locations; the capacity of other hosts is not known here."""
        num_blocks = len(await self._block_hashes())
        return StoreStats("redis", num_blocks, num_blocks * self._format.value_bytes, None)

    async def verify(self) -> VerifyReport:
        """Read everything in the local files."""
        return await self._local.verify()

    async def close(self) -> None:
        """Stop serving. The files and the locations in Redis are kept."""
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
        await self._exchange.close()
        await self._link.close()
        await self._local.close()
        await self._threads.close(self._timeout_s)

    # ------------------------------------------------------------ locations in Redis

    def _key(self, block_hash: bytes) -> str:
        return self._prefix + block_hash.hex()

    def _address_key(self, owner: str) -> str:
        return f"kvrelay:owner:{owner}:{self._format.namespace.hex()}"

    def _location(self, block_hash: bytes) -> Command:
        return ("SET", self._key(block_hash), self._owner, "EX", self._ttl_s)

    async def _owners(self, block_hashes: Sequence[bytes]) -> list[str]:
        """Return the owner of each block, "" if unknown, and renew the locations."""
        results = await self._link.run([("GETEX", self._key(one), "EX", self._ttl_s) for one in block_hashes])
        return [_text(result) or "" for result in results]

    async def _address(self, owner: str) -> str | None:
        [result] = await self._link.run([("GET", self._address_key(owner))])
        return _text(result)

    async def _forget(self, block_hashes: Sequence[bytes]) -> None:
        if block_hashes:
            await self._link.run([("UNLINK", self._key(block_hash)) for block_hash in block_hashes])

    async def _block_hashes(self) -> list[bytes]:
        return await self._link.block_hashes(self._prefix)


def _text(value: object) -> str | None:
    """Return a value of Redis as text. What somebody else wrote there may be no text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else None


def _known_owner_id(root: Path) -> str:
    """Return the directory's id, "" if it has none. Blocks."""
    try:
        return (root / "owner").read_text()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError(f"cannot use the KV in {root}: {error}") from error


def _owner_id(root: Path) -> str:
    """Return the directory's id, created if it has none. Blocks; safe to call concurrently."""
    path, draft = root / "owner", root / f"owner.{secrets.token_hex(8)}"
    try:
        if not path.exists():
            draft.write_text(secrets.token_hex(8))
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(draft)
            draft.unlink()
        return path.read_text()
    except OSError as error:
        raise StorageError(f"cannot keep KV in {root}: {error}") from error
