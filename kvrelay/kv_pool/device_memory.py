"""A KV pool on a device, which the node's messager and messagers on the same host open by its handle.

Beside the blocks there is a table in host memory with a digest of each block of each plane, made where and when the
block was written: by the engine for layers that it has computed, by whoever copied or loaded a block for others. A
messager therefore sends a block without touching it, and what happens to it later is noticed by whoever copies it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np

from kvrelay.errors import ConfigError, GeometryMismatchError
from kvrelay.kv_pool.block_digest import Words, fold
from kvrelay.kv_pool.cuda_frameworks import cuda_api
from kvrelay.kv_pool.device_blocks import BlockWork, DeviceBlocks
from kvrelay.kv_pool.interface import HostBlock, KVPool
from kvrelay.kv_pool.shared_file import create_file, map_file, open_file
from kvrelay.kv_pool.simulated_blocks import SimulatedBlocks
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId
from kvrelay.protocol.kv_handle import KVDeviceHandle

WORD_BYTES = 8

_STAGED_BYTES = 32 << 20
"""Host memory that one step of copying whole blocks out or in takes."""


class DigestTable:
    """Digests int64 [planes, blocks] of one pool, in memory that other processes map."""

    def __init__(self, shape: tuple[int, int], fd: int) -> None:
        self._fd = fd
        self._map = map_file(fd, WORD_BYTES * int(np.prod(shape)))
        self._digests: Words = np.frombuffer(self._map, np.int64, int(np.prod(shape))).reshape(shape)

    def put(self, planes: range, block_ids: list[BlockId], digests: Words) -> None:
        """Note ``digests`` [planes, blocks]."""
        self._digests[planes.start : planes.stop, block_ids] = digests

    def get(self, planes: range, block_ids: list[BlockId]) -> Words:
        """Return digests [planes, blocks]."""
        digests: Words = self._digests[planes.start : planes.stop].take(block_ids, 1)
        return digests

    def close(self) -> None:
        """Give the memory back."""
        del self._digests
        self._map.close()
        os.close(self._fd)


class BlockCopy:
    """A copy or a digest under way; when it is done its digests are in the table."""

    def __init__(self, work: BlockWork, table: DigestTable, planes: range, block_ids: list[BlockId]) -> None:
        self._work = work
        self._table = table
        self._planes = planes
        self._block_ids = block_ids

    @property
    def is_done(self) -> bool:
        """Whether ``wait`` returns at once."""
        return self._work.is_done

    def wait(self) -> int:
        """Return the digest of what was read, when it is done; from any thread. Raises DeviceError."""
        digests = self._work.wait()
        self._table.put(self._planes, self._block_ids, digests)
        return fold(digests)


class DeviceMemory:
    """All KV blocks of one node (see ``interface.KVPool``). Digests are ``block_digest``'s.

    Only the engine, which owns them, uses ``blocks`` and ``begin_digest``. It need not digest what it computes if this
    node never sends KV: ``digest`` means nothing then.
    """

    def __init__(self, geometry: KVGeometry, handle: KVDeviceHandle, blocks: DeviceBlocks, table: DigestTable) -> None:
        self.geometry = geometry
        self.handle = handle
        self.num_blocks = handle.num_blocks
        self.blocks: Any = blocks
        self._table = table

    @classmethod
    def create(
        cls,
        geometry: KVGeometry,
        num_blocks: int,
        kind: Literal["cuda", "simulated"],
        framework: Literal["torch", "paddle"] = "torch",
    ) -> Self:
        """Make zeroed memory for ``num_blocks`` blocks, owned by this process. Raises ConfigError if that cannot be."""
        if geometry.plane_block_bytes % WORD_BYTES:
            raise ConfigError([f"cache.block_size: a block on a device is a multiple of {WORD_BYTES} bytes"])
        shape = _shape(geometry, num_blocks)
        try:
            fd, tag = create_file("kvrelay-digests", WORD_BYTES * shape[0] * shape[1])
            table = DigestTable(shape[:2], fd)
            try:
                blocks: DeviceBlocks = _create_blocks(shape, kind, framework)
            except BaseException:
                table.close()
                raise
        except OSError as error:
            size_bytes = num_blocks * geometry.block_bytes
            problem = f"cache.num_blocks: {num_blocks:,} blocks take {size_bytes:,} bytes: {error.strerror or error}"
            raise ConfigError([problem]) from error
        handle = KVDeviceHandle(os.getpid(), fd, tag, num_blocks, kind, blocks.memory, framework)
        return cls(geometry, handle, blocks, table)

    @classmethod
    def attach(cls, geometry: KVGeometry, handle: KVDeviceHandle) -> Self:
        """Open the memory another process of this host made.

        Raises PeerLostError if that process is gone or its memory out of reach, GeometryMismatchError if it is not of
        the size that ``geometry`` and ``handle`` say.
        """
        shape = _shape(geometry, handle.num_blocks)
        fd = open_file(handle.pid, handle.fd, handle.tag, WORD_BYTES * shape[0] * shape[1])
        table = DigestTable(shape[:2], fd)
        try:
            blocks = _open_blocks(shape, handle)
        except BaseException:
            table.close()
            raise
        return cls(geometry, handle, blocks, table)

    # ------------------------------------------------------------ for the engine, and for links between devices

    def begin_digest(self, layers: range, block_ids: list[BlockId], after: Any = None) -> BlockCopy:
        """Note the digests of blocks that the engine has written, as they are past the device's event ``after``."""
        planes = _planes(layers)
        return BlockCopy(self.blocks.begin_digest(planes, block_ids, after), self._table, planes, block_ids)

    def begin_copy(
        self, source: DeviceMemory, layers: range, target_ids: list[BlockId], source_ids: list[BlockId]
    ) -> BlockCopy:
        """Do as ``copy_from`` without waiting for the device. Raises DeviceError."""
        planes = _planes(layers)
        work = self.blocks.begin_copy(source.blocks, planes, target_ids, source_ids)
        return BlockCopy(work, self._table, planes, target_ids)

    # ------------------------------------------------------------ for those who do not own it: see KVPool

    def read(self, layers: range, block_ids: list[BlockId]) -> list[memoryview]:
        """See KVPool: a copy."""
        return [self.blocks.read(_planes(layers), block_ids).reshape(-1).view(np.uint8).data]

    def gather(self, layers: range, block_ids: list[BlockId], into: memoryview) -> int:
        """See KVPool: the digest is that of the blocks when they were written."""
        into[:] = self.read(layers, block_ids)[0]
        return self.digest(layers, block_ids)

    def digest(self, layers: range, block_ids: list[BlockId]) -> int:
        """See KVPool: what the payload was when it was written; nothing is read."""
        return fold(self._table.get(_planes(layers), block_ids))

    def write(self, layers: range, block_ids: list[BlockId], payload: Sequence[memoryview]) -> None:
        """See KVPool."""
        planes = _planes(layers)
        whole = payload[0] if len(payload) == 1 else b"".join(payload)
        words = np.frombuffer(whole, np.int64).reshape(len(planes), len(block_ids), -1)
        self._write(planes, block_ids, words)

    def copy_from(self, source: KVPool, layers: range, target_ids: list[BlockId], source_ids: list[BlockId]) -> int:
        """See KVPool: the source must be on a device of the same kind."""
        if not isinstance(source, DeviceMemory) or source.handle.kind != self.handle.kind:
            raise GeometryMismatchError(f"a device's memory cannot be copied from {type(source).__name__}")
        return self.begin_copy(source, layers, target_ids, source_ids).wait()

    def copy_out(self, block_ids: Sequence[BlockId], into: Sequence[HostBlock]) -> None:
        """See KVPool."""
        every = _planes(range(self.geometry.num_layers))
        for some in self._pieces(len(block_ids)):
            words = self.blocks.read(every, list(block_ids[some]))
            for place, target in enumerate(into[some]):
                target[:] = words[:, place].view(np.uint8).reshape(target.shape)

    @contextlib.contextmanager
    def lend(self, block_ids: Sequence[BlockId]) -> Iterator[list[HostBlock]]:
        """See KVPool: staging memory, copied to the device at the end."""
        geometry = self.geometry
        staging = np.zeros((len(block_ids), geometry.num_layers, 2, geometry.plane_block_bytes), np.uint8)
        yield list(staging)
        every = _planes(range(geometry.num_layers))
        for some in self._pieces(len(block_ids)):
            words = staging[some].view(np.int64).reshape(-1, len(every), geometry.plane_block_bytes // WORD_BYTES)
            self._write(every, list(block_ids[some]), np.ascontiguousarray(words.swapaxes(0, 1)))

    def _write(self, planes: range, block_ids: list[BlockId], words: Words) -> None:
        self._table.put(planes, block_ids, self.blocks.write(planes, block_ids, words))

    def _pieces(self, num_blocks: int) -> Iterator[slice]:
        """Yield so many blocks at a time as are staged at once."""
        count = max(1, _STAGED_BYTES // self.geometry.block_bytes)
        for first in range(0, num_blocks, count):
            yield slice(first, first + count)

    def close(self) -> None:
        """Give the memory back; it is gone when the process that made it has done so, or has ended."""
        self.blocks.close()
        self._table.close()


def _shape(geometry: KVGeometry, num_blocks: int) -> tuple[int, int, int]:
    return 2 * geometry.num_layers, num_blocks, geometry.plane_block_bytes // WORD_BYTES


def _planes(layers: range) -> range:
    return range(2 * layers.start, 2 * layers.stop)


def _create_blocks(
    shape: tuple[int, int, int], kind: Literal["cuda", "simulated"], framework: Literal["torch", "paddle"]
) -> DeviceBlocks:
    if kind == "simulated":
        return SimulatedBlocks.create(shape)
    api = cuda_api(framework)  # before Triton is imported
    from kvrelay.kv_pool.cuda_blocks import CudaBlocks  # noqa: PLC0415 (only processes that use a GPU have Triton)

    return CudaBlocks.create(shape, api)


def _open_blocks(shape: tuple[int, int, int], handle: KVDeviceHandle) -> DeviceBlocks:
    if handle.kind == "simulated":
        return SimulatedBlocks.open(shape, handle.memory)
    api = cuda_api(handle.framework)
    from kvrelay.kv_pool.cuda_blocks import CudaBlocks  # noqa: PLC0415

    return CudaBlocks.open(shape, handle.memory, api)
