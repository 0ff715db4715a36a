"""A KV pool in host memory, shared with the node's messager and with messagers on the same host.

The memory is an anonymous file that these processes map; see ``shared_file``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from kvrelay.errors import ConfigError, GeometryMismatchError
from kvrelay.kv_pool import block_copy as kv_copy
from kvrelay.kv_pool.interface import HostBlock, KVPool
from kvrelay.kv_pool.shared_file import create_file, map_file, open_file
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId
from kvrelay.protocol.kv_handle import KVMemoryHandle

_FEWEST_HUGE_BYTES = 16 << 20

Bytes = npt.NDArray[np.uint8]


class KVMemory:
    """All KV blocks of one node (see ``kv_pool.interface.KVPool``).

    Only the engine, the owner, uses ``planes[layer, 0 for K or 1 for V, block]``: the bytes of a block in one layer.
    """

    def __init__(self, geometry: KVGeometry, handle: KVMemoryHandle, fd: int) -> None:
        self.geometry = geometry
        self.handle = handle
        self.num_blocks = handle.num_blocks
        self._fd = fd
        shape = (geometry.num_layers, 2, handle.num_blocks, geometry.plane_block_bytes)
        self._map = map_file(fd, int(np.prod(shape)))
        if len(self._map) >= _FEWEST_HUGE_BYTES:
            # blocks are read in any order: on small pages each would cost a walk through the page tables
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.planes: Bytes = np.frombuffer(self._map, np.uint8, int(np.prod(shape))).reshape(shape)

    @classmethod
    def create(cls, geometry: KVGeometry, num_blocks: int) -> KVMemory:
        """Create zeroed memory for ``num_blocks`` blocks, owned by this process.

        Raises ConfigError if this machine does not have that much memory.
        """
        size_bytes = num_blocks * geometry.block_bytes
        if size_bytes > (total := _machine_bytes()):
            raise _too_large(num_blocks, size_bytes, f"this machine has {total:,} bytes of memory")
        try:
            fd, tag = create_file("kvrelay-kv", size_bytes)
            return cls(geometry, KVMemoryHandle(os.getpid(), fd, tag, num_blocks), fd)
        except OSError as error:
            raise _too_large(num_blocks, size_bytes, str(error.strerror)) from error

    @classmethod
    def attach(cls, geometry: KVGeometry, handle: KVMemoryHandle) -> KVMemory:
        """Map memory that another process of this host created.

        Raises PeerLostError if that process is gone or out of reach, GeometryMismatchError if the memory is not
        of the size that ``geometry`` and ``handle`` say.
        """
        fd = open_file(handle.pid, handle.fd, handle.tag, handle.num_blocks * geometry.block_bytes)
        return cls(geometry, handle, fd)

    @property
    def size_bytes(self) -> int:
        """Size of all blocks, in bytes."""
        return self.planes.nbytes

    # ------------------------------------------------------------ for those who do not own it: see KVPool

    def read(self, layers: range, block_ids: list[BlockId]) -> list[memoryview]:
        """Consecutive blocks are returned as views, scattered ones as copies."""
        return kv_copy.read(self._planes_of(layers), block_ids)

    def gather(self, layers: range, block_ids: list[BlockId], into: memoryview) -> int:
        def copied() -> Iterator[memoryview]:
            done = 0
            for piece in kv_copy.pieces(self._planes_of(layers), block_ids):
                into[done : done + piece.nbytes] = piece
                done += piece.nbytes
                yield piece

        return _digest(copied())

    def digest(self, layers: range, block_ids: list[BlockId]) -> int:
        return _digest(kv_copy.pieces(self._planes_of(layers), block_ids))

    def write(self, layers: range, block_ids: list[BlockId], payload: Sequence[memoryview]) -> None:
        kv_copy.write(self._planes_of(layers), block_ids, payload)

    def copy_from(self, source: KVPool, layers: range, target_ids: list[BlockId], source_ids: list[BlockId]) -> int:
        """The source must be host memory too."""
        if not isinstance(source, KVMemory):
            raise GeometryMismatchError(f"host memory cannot be copied from {type(source).__name__}")
        return _digest(kv_copy.copy(self._planes_of(layers), target_ids, source._planes_of(layers), source_ids))

    def copy_out(self, block_ids: Sequence[BlockId], into: Sequence[HostBlock]) -> None:
        for block, target in zip(block_ids, into, strict=True):
            np.copyto(target, self.planes[:, :, block])

    @contextlib.contextmanager
    def lend(self, block_ids: Sequence[BlockId]) -> Iterator[list[HostBlock]]:
        """The returned memory is that of the blocks."""
        yield [self.planes[:, :, block] for block in block_ids]

    def _planes_of(self, layers: range) -> list[Bytes]:
        """Return K and V of each layer."""
        return [plane for layer in layers for plane in self.planes[layer]]

    def close(self) -> None:
        """Unmap the memory. It is freed when the last process has unmapped it."""
        del self.planes
        with contextlib.suppress(BufferError):  # a view is still alive (an engine's tensor): the mapping goes with it
            self._map.close()
        os.close(self._fd)


def _digest(parts: Iterable[memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _too_large(num_blocks: int, size_bytes: int, reason: str) -> ConfigError:
    return ConfigError([f"cache.num_blocks: {num_blocks:,} blocks take {size_bytes:,} bytes: {reason}"])
