"""The memory of a node's KV pool, shared with its messager and with messagers on the same host.

The memory is an anonymous file (``memfd_create``): it has no name that could outlive its processes, so a node
that is killed leaves nothing behind, and its size is not bound by a small ``/dev/shm``. Another process of the
same user maps it through ``/proc/<pid>/fd/<fd>``; a random tag in the last bytes tells whether a handle still means
this memory or the pid has been reused.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets

import numpy as np
import numpy.typing as npt

from kvrelay.core.errors import ConfigError, GeometryMismatchError, PeerLostError
from kvrelay.core.geometry import KVGeometry
from kvrelay.core.ids import BlockId
from kvrelay.core.kv_handle import KVMemoryHandle

TAG_BYTES = 16

_FEWEST_HUGE_BYTES = 16 << 20

Bytes = npt.NDArray[np.uint8]


class KVMemory:
    """All KV blocks of one node: ``planes[layer, 0 for K or 1 for V, block]`` is one block's bytes in one layer."""

    def __init__(self, geometry: KVGeometry, handle: KVMemoryHandle, fd: int) -> None:
        self.geometry = geometry
        self.handle = handle
        self.num_blocks = handle.num_blocks
        self._fd = fd
        shape = (geometry.num_layers, 2, handle.num_blocks, geometry.plane_block_bytes)
        self._map = mmap.mmap(fd, int(np.prod(shape)) + TAG_BYTES)
        if len(self._map) >= _FEWEST_HUGE_BYTES:
            # blocks are read in any order: on small pages each would cost a walk through the page tables
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.planes: Bytes = np.frombuffer(self._map, np.uint8, int(np.prod(shape))).reshape(shape)

    @classmethod
    def create(cls, geometry: KVGeometry, num_blocks: int) -> KVMemory:
        """Make zeroed memory for ``num_blocks`` blocks, owned by this process.

        Raises ConfigError if that is more than this machine has or gives.
        """
        size_bytes = num_blocks * geometry.block_bytes
        if size_bytes > (total := _machine_bytes()):
            raise _too_large(num_blocks, size_bytes, f"this machine has {total:,} bytes of memory")
        fd = os.memfd_create("kvrelay-kv", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes + TAG_BYTES)
            tag = secrets.token_hex(TAG_BYTES // 2)
            os.pwrite(fd, tag.encode(), size_bytes)
            return cls(geometry, KVMemoryHandle(os.getpid(), fd, tag, num_blocks), fd)
        except OSError as error:
            os.close(fd)
            raise _too_large(num_blocks, size_bytes, str(error.strerror)) from error

    @classmethod
    def attach(cls, geometry: KVGeometry, handle: KVMemoryHandle) -> KVMemory:
        """Map the memory another process of this host made.

        Raises PeerLostError if that process is gone or out of reach, GeometryMismatchError if the memory is not
        of the size that ``geometry`` and ``handle`` say.
        """
        try:
            fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PeerLostError(f"cannot map the KV memory of process {handle.pid}: {error}") from error
        size_bytes = handle.num_blocks * geometry.block_bytes
        if os.fstat(fd).st_size != size_bytes + TAG_BYTES:
            os.close(fd)
            raise GeometryMismatchError(f"KV memory of process {handle.pid} is not {size_bytes} bytes")
        if os.pread(fd, TAG_BYTES, size_bytes) != handle.tag.encode():
            os.close(fd)
            raise PeerLostError(f"process {handle.pid} is no longer the one that made this KV memory")
        return cls(geometry, handle, fd)

    @property
    def size_bytes(self) -> int:
        """Bytes of all blocks together."""
        return self.planes.nbytes

    def layer_parts(self, layer: int, block_ids: list[BlockId]) -> list[Bytes]:
        """Return views of ``block_ids`` in one layer: all K, then all V, one view for each run of consecutive ids."""
        runs = consecutive_runs(block_ids)
        return [self.planes[layer, kv, first : first + count].reshape(-1) for kv in (0, 1) for first, count in runs]

    def close(self) -> None:
        """Give the memory back; it is gone when the last process that maps it has done so."""
        del self.planes
        with contextlib.suppress(BufferError):  # a view is still alive (an engine's tensor): the mapping goes with it
            self._map.close()
        os.close(self._fd)


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _too_large(num_blocks: int, size_bytes: int, reason: str) -> ConfigError:
    return ConfigError([f"cache.num_blocks: {num_blocks:,} blocks take {size_bytes:,} bytes: {reason}"])


def consecutive_runs(block_ids: list[BlockId]) -> list[tuple[BlockId, int]]:
    """Return ``block_ids`` as (first, count) runs, in order: ``[4, 5, 6, 2]`` is ``[(4, 3), (2, 1)]``."""
    runs: list[tuple[BlockId, int]] = []
    for block in block_ids:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
