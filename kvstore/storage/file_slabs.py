"""The slabs of the ``file`` backend: preallocated files of slots with one value each."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Self

from kvstore.storage.block_format import Value
from kvstore.storage.file_layout import Layout


class FileSlabs:
    """All slots of a layout. Methods block for one read or write. Called from any thread."""

    def __init__(self, layout: Layout, fds: list[int]) -> None:
        self._slot_bytes = layout.slot_bytes
        self._slots_per_slab = layout.slots_per_slab
        self._fds = fds

    @classmethod
    def open(cls, directory: Path, layout: Layout) -> Self:
        """Open the slabs in ``directory``; missing or truncated ones are preallocated.

        Raises OSError, for example if the disk is too small.
        """
        sizes = [num_slots * layout.slot_bytes for num_slots in layout.slab_slots]
        paths = [slab_path(directory, number) for number in range(len(sizes))]
        _require_space(directory, sum(sizes) - sum(path.stat().st_size for path in paths if path.exists()))
        slabs = cls(layout, [])
        try:
            for path, size_bytes in zip(paths, sizes, strict=True):
                slabs._add(path, size_bytes)
        except OSError:
            slabs.close()
            raise
        return slabs

    def _add(self, path: Path, size_bytes: int) -> None:
        self._fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if os.fstat(self._fds[-1]).st_size < size_bytes:
            os.posix_fallocate(self._fds[-1], 0, size_bytes)

    def read(self, slot: int, value: Value) -> bool:
        """Fill ``value`` from ``slot``; False if the file is too short."""
        fd, offset = self._place(slot)
        return os.preadv(fd, [value.data], offset) == len(value)

    def write(self, slot: int, value: Value) -> bool:
        """Write ``value`` to ``slot``; False if the disk has no room for all of it."""
        fd, offset = self._place(slot)
        return os.pwrite(fd, value.data, offset) == len(value)

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _place(self, slot: int) -> tuple[int, int]:
        slab, index = divmod(slot, self._slots_per_slab)
        return self._fds[slab], index * self._slot_bytes


def _require_space(directory: Path, size_bytes: int) -> None:
    """Raise OSError if ``size_bytes`` do not fit; otherwise the kernel would fill the disk before it fails."""
    disk = os.statvfs(directory)
    if disk.f_bavail * disk.f_frsize < size_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def slab_path(directory: Path, number: int) -> Path:
    """Return the path of slab ``number``."""
    return directory / f"slab-{number:04d}"
