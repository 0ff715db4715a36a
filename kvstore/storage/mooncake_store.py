"""Backend ``mooncake``: values in the pooled memory of Mooncake Store, over TCP.

Needs the extra ``kvrelay[mooncake]`` and a running ``mooncake_master``. Every node that opens the store
contributes ``capacity`` bytes of its memory. The master places values and evicts them. The client library logs to
standard error (``GLOG_minloglevel=2`` quiets it) and cannot list keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrelay.addresses import resolve
from kvrelay.errors import StorageError, StorageUnavailableError
from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.batches import batches
from kvstore.storage.block_format import BlockFormat
from kvstore.storage.calls import Delivery, GetCall, PutCall
from kvstore.storage.interface import PutOutcome, StoreCounters, StoreStats, VerifyReport
from kvstore.storage.threads import BlockingThreads

_NOT_FOUND = -704
_TOO_LARGE = -600
_NO_ANSWER = range(-999, -899)
"""Codes of the client library: no such object; larger than the buffer; no answer from the master."""

_STAGING_BYTES = 4 << 20
_LIBRARY_BUFFER_BYTES = 16 << 20
_PROBE_S = 1.0
_BATCH_KEYS = 256

logger = logging.getLogger(__name__)


class MooncakeBackend:
    """Values in the Mooncake Store of ``master``. ``host``: the address of this node for others."""

    def __init__(self, geometry: KVGeometry, master: str, host: str, capacity_bytes: int, timeout_s: float) -> None:
        self.counters = StoreCounters()
        self._format = BlockFormat(geometry)
        self._prefix = f"kvrelay:{self._format.namespace.hex()}:"
        self._master = master
        self._host = host
        self._capacity_bytes = capacity_bytes
        self._timeout_s = timeout_s
        self._threads = BlockingThreads("kv-mooncake")
        self._connecting = threading.Lock()
        self._client: Any = None
        num_blocks = max(1, min(_BATCH_KEYS, _STAGING_BYTES // self._format.value_bytes))
        self._read_staging = _Staging(num_blocks, self._format.value_bytes)
        self._write_staging = _Staging(num_blocks, self._format.value_bytes)

    async def open(self) -> None:
        """Join the store, now or when the master is available. Raises StorageError if the library cannot be loaded."""
        try:
            await self._threads.write(self._connected)
        except StorageUnavailableError as error:
            logger.warning("%s; trying again later", error.message)

    async def put(self, call: PutCall) -> None:
        """Send the missing blocks, batch by batch."""
        await self._threads.write(lambda: self._put(call))

    async def get(self, call: GetCall) -> None:
        """Read the stored blocks, batch by batch."""
        await self._threads.read(lambda: self._get(call))

    async def contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
        return await self._threads.read(lambda: self._contains(block_hashes))

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        """Remove the objects, even if they were read recently."""
        return await self._threads.write(lambda: self._delete(block_hashes))

    async def clear(self) -> int:
        """Remove all objects of this geometry."""
        return await self._threads.write(self._clear)

    async def stats(self) -> StoreStats:
        """Return unknown totals. Raises StorageUnavailableError without an answer from the master."""
        await self.contains([bytes(32)])
        return StoreStats("mooncake", None, None, None)

    async def verify(self) -> VerifyReport:
        """Raise StorageError, because Mooncake cannot list its objects."""
        raise StorageError("mooncake cannot list its objects; every block is verified when it is read")

    async def close(self) -> None:
        """Leave the store and withdraw this node's memory from it."""
        with contextlib.suppress(TimeoutError):  # slow if the master is unavailable
            async with asyncio.timeout(self._timeout_s):
                await self._threads.write(self._disconnect)
        await self._threads.close(self._timeout_s)

    # ------------------------------------------------------------ in the threads

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        if _is_ipv6(self._host):
            os.environ["MC_USE_IPV6"] = "1"  # read when the library is loaded; without it nodes join but cannot read
        try:
            library = importlib.import_module("mooncake.store")
        except ImportError as error:  # the package or one of its system libraries is not installed
            raise StorageError(f"storage.backend mooncake cannot be loaded: {error}") from error
        host, _, port = self._master.rpartition(":")
        try:  # the library itself would retry for 90 seconds
            socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
        except OSError as error:
            raise StorageUnavailableError(f"Mooncake master at {self._master}: {error}") from error
        client = library.MooncakeDistributedStore()
        code = client.setup(
            self._host, "P2PHANDSHAKE", self._capacity_bytes, _LIBRARY_BUFFER_BYTES, "tcp", "", self._master
        )
        if code:
            raise StorageUnavailableError(f"Mooncake master at {self._master}: set-up failed with code {code}")
        for staging in (self._read_staging, self._write_staging):
            client.register_buffer(staging.address, staging.values.nbytes)
        return client

    def _disconnect(self) -> None:
        if self._client is None:
            return
        for staging in (self._read_staging, self._write_staging):
            self._client.unregister_buffer(staging.address)
        self._client.close()
        self._client = None

    def _put(self, call: PutCall) -> None:
        missing = []
        for index, present in enumerate(self._contains(call.block_hashes)):
            if present:
                call.outcomes[index] = PutOutcome.PRESENT
            else:
                missing.append(index)
        staging = self._write_staging
        for batch in batches(missing, len(staging.values)):
            if not all(call.pack(index, value) for index, value in zip(batch, staging.values, strict=False)):
                return
            keys = self._keys(call.block_hashes[index] for index in batch)
            codes = self._connected().batch_put_from(keys, *staging.first(len(batch)))
            for index, code in zip(batch, self._answered(codes), strict=True):
                call.outcomes[index] = PutOutcome.FAILED if code else PutOutcome.WRITTEN

    def _get(self, call: GetCall) -> None:
        staging = self._read_staging
        for batch in batches(range(len(call.block_hashes)), len(staging.values)):
            if call.loan.ended:
                return
            # The library reads a repeated key only once.
            rows = {
                block_hash: row for row, block_hash in enumerate({call.block_hashes[index]: None for index in batch})
            }
            client = self._connected()
            sizes = self._answered(client.batch_get_into(self._keys(rows), *staging.first(len(rows))))
            bad = {
                call.block_hashes[index]: None
                for index in batch
                if not self._deliver(call, index, rows[call.block_hashes[index]], sizes)
            }
            self.counters.corrupt_blocks += len(bad)
            self._delete(list(bad))

    def _deliver(self, call: GetCall, index: int, row: int, sizes: Sequence[int]) -> bool:
        """Deliver the value read for block ``index``, if any; False if it is damaged."""
        if sizes[row] == self._format.value_bytes:
            return call.deliver(index, self._read_staging.values[row]) is not Delivery.BAD
        if sizes[row] < 0 and sizes[row] not in (_NOT_FOUND, _TOO_LARGE):
            self.counters.errors += 1
        return sizes[row] < 0 and sizes[row] != _TOO_LARGE

    def _contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
        found: list[bool] = []
        for batch in batches(block_hashes, _BATCH_KEYS):
            found += [code == 1 for code in self._answered(self._connected().batch_is_exist(self._keys(batch)))]
        return found

    def _delete(self, block_hashes: Sequence[bytes]) -> int:
        if not block_hashes:
            return 0
        codes = self._connected().batch_remove(self._keys(block_hashes), force=True)
        return sum(code == 0 for code in self._answered(codes))

    def _clear(self) -> int:
        [num_removed] = self._answered([self._connected().remove_by_regex(f"^{self._prefix}.*", force=True)])
        return num_removed

    def _answered(self, codes: list[int]) -> list[int]:
        if codes and all(code in _NO_ANSWER for code in codes):
            raise StorageUnavailableError(f"Mooncake master at {self._master}: code {codes[0]}")
        return codes

    def _keys(self, block_hashes: Iterable[bytes]) -> list[str]:
        return [self._prefix + block_hash.hex() for block_hash in block_hashes]


class _Staging:
    """Buffers for values, registered with the library; each thread has its own."""

    def __init__(self, num_blocks: int, value_bytes: int) -> None:
        self.values: npt.NDArray[np.uint8] = np.empty((num_blocks, value_bytes), np.uint8)
        self.address: int = self.values.ctypes.data

    def first(self, count: int) -> tuple[list[int], list[int]]:
        """Return addresses and sizes of the first ``count`` values."""
        size = self.values.shape[1]
        return [self.address + index * size for index in range(count)], [size] * count


def _is_ipv6(host: str) -> bool:
    with contextlib.suppress(OSError):
        return resolve(host, 0)[0] == socket.AF_INET6
    return False
