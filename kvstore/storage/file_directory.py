"""The directory of the ``file`` backend: one subdirectory per geometry, shared by all processes of the host.

::

    PATH/<namespace in hex>/lock, index, slab-0000, slab-0001, ...

A process that uses a subdirectory holds a shared lock on its ``lock`` file. A process with the exclusive lock may
re-create or remove it. A subdirectory that no process uses is removed when another one is opened, so that the capacity
is not used twice.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from kvrelay.errors import StorageError, StorageUnavailableError
from kvstore.storage.file_layout import SETS_OFFSET, Layout
from kvstore.storage.file_lock import try_lock
from kvstore.storage.file_slabs import slab_path

_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_RETRY_S = 0.005


class FileDirectory:
    """One process's use of the subdirectory of one geometry, until ``close``."""

    def __init__(self, path: Path, layout: Layout, index_fd: int, lock_fd: int) -> None:
        self.path = path
        self.layout = layout
        self.index_fd = index_fd
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, root: Path, wanted: Layout, timeout_s: float) -> FileDirectory:
        """Create the subdirectory of ``wanted`` in ``root``, or use the existing one with its layout.

        Blocks. Raises StorageError if it cannot be created, StorageUnavailableError if locked for ``timeout_s``.
        """
        path = root / wanted.namespace.hex()
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            _remove_unused(root, path)
            lock_fd = _join(path, wanted, timeout_s)
        except OSError as error:
            raise StorageError(f"cannot keep KV in {root}: {error}") from error
        return cls._joined(path, wanted, lock_fd)

    @classmethod
    def join(cls, root: Path, wanted: Layout, timeout_s: float) -> FileDirectory:
        """Use the existing subdirectory of ``wanted``'s geometry with its layout; create and remove nothing.

        Blocks. Raises as ``open``.
        """
        path = root / wanted.namespace.hex()
        try:
            lock_fd = _share(path, timeout_s)
        except OSError as error:
            raise StorageError(f"cannot use the KV in {root}: {error}") from error
        return cls._joined(path, wanted, lock_fd)

    @classmethod
    def _joined(cls, path: Path, wanted: Layout, lock_fd: int) -> FileDirectory:
        try:
            layout = _read_layout(path)
            index_fd = os.open(path / "index", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            os.close(lock_fd)
            raise StorageError(f"cannot use the KV in {path}: {error}") from error
        if layout is None or layout.namespace != wanted.namespace or layout.slot_bytes != wanted.slot_bytes:
            os.close(index_fd)
            os.close(lock_fd)
            raise StorageError(f"{path / 'index'} is damaged, and other processes use it")
        return cls(path, layout, index_fd, lock_fd)

    def close(self) -> None:
        """Close the files and release the shared lock."""
        os.close(self.index_fd)
        os.close(self._lock_fd)


def namespaces(root: Path) -> list[Path]:
    """Return the subdirectories of geometries in ``root``."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAMESPACE.fullmatch(path.name) and (path / "lock").exists())


def is_laid_out(root: Path, namespace: bytes) -> bool:
    """Return whether ``root`` has a subdirectory of this geometry. Raises StorageError if it cannot be read."""
    try:
        return _read_layout(root / namespace.hex()) is not None
    except OSError as error:
        raise StorageError(f"cannot use the KV in {root}: {error}") from error


def _share(path: Path, timeout_s: float) -> int:
    """Return a descriptor with a shared lock on an existing subdirectory."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
        if try_lock(lock_fd, shared=True) and _is_current(lock_fd, path) and _read_layout(path) is not None:
            return lock_fd
        os.close(lock_fd)
        time.sleep(_RETRY_S)
    raise StorageUnavailableError(f"{path} is being made or removed by another process for more than {timeout_s:.3g} s")


def _join(path: Path, wanted: Layout, timeout_s: float) -> int:
    """Return a descriptor with a shared lock on a subdirectory; create its layout if needed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        lock_fd = _open_lock(path)
        if try_lock(lock_fd) and _is_current(lock_fd, path) and _read_layout(path) != wanted:
            _lay_out(path, wanted)
        # Downgrading an exclusive lock releases it briefly, and another process may re-create the files: read again.
        if try_lock(lock_fd, shared=True) and _is_current(lock_fd, path) and _read_layout(path) is not None:
            return lock_fd
        os.close(lock_fd)
        time.sleep(_RETRY_S)
    raise StorageUnavailableError(f"{path} is being made or removed by another process for more than {timeout_s:.3g} s")


def _open_lock(path: Path) -> int:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_current(lock_fd: int, path: Path) -> bool:
    """Whether the locked file is still the one in the directory and was not removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(lock_fd), (path / "lock").stat())
    except FileNotFoundError:
        return False


def _read_layout(path: Path) -> Layout | None:
    try:
        with (path / "index").open("rb") as index:
            layout = Layout.unpack(index.read(SETS_OFFSET))
    except FileNotFoundError:
        return None
    return layout


def _lay_out(path: Path, layout: Layout) -> None:
    """Create an empty index of ``layout``. It is renamed to its name when complete."""
    _remove_files(path)
    draft = path / "index.draft"
    with draft.open("wb") as index:
        index.write(layout.pack())
        index.truncate(layout.index_bytes)
    draft.rename(path / "index")


def _remove_unused(root: Path, used: Path) -> None:
    for path in namespaces(root):
        if path == used:
            continue
        lock_fd = _open_lock(path)
        if try_lock(lock_fd) and _is_current(lock_fd, path):
            _remove_files(path)
            (path / "lock").unlink()
            path.rmdir()
        os.close(lock_fd)


def _remove_files(path: Path) -> None:
    """Remove only the files of this backend from ``path``."""
    for name in ("index", "index.draft"):
        (path / name).unlink(missing_ok=True)
    number = 0
    while (slab := slab_path(path, number)).exists():
        slab.unlink()
        number += 1
