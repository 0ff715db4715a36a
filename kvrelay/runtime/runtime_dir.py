"""A directory for the ipc sockets of one cluster on one host."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "KVRELAY_RUNTIME_DIR"
"""Environment variable with the directory of the ipc sockets."""

_PREFIX = "kvrelay-"

_LOCK = "lock"
"""File in the directory that its maker keeps locked: the kernel unlocks it when that process ends, however it ends."""

_MAX_PATH_BYTES = 64
"""Maximum length of the directory: an ipc path has at most 107 bytes, and sockets need names."""


@contextmanager
def runtime_dir(env: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Return a context with a directory that only this user can access. It is removed at the end.

    If a parent process made one already (``KVRELAY_RUNTIME_DIR``) that is it, and its maker removes it. Directories
    that killed processes of this user left behind are removed first.
    """
    if given := env.get(VARIABLE):
        yield Path(given)
        return
    parent = Path(_parent(env))
    _remove_left_behind(parent)
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = _locked(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked(directory: Path) -> int:
    """Put the lock into ``directory``; return its descriptor. No other process sees the file before it is locked."""
    new = directory / f"{_LOCK}.new"
    descriptor = os.open(new, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    new.rename(directory / _LOCK)
    return descriptor


def _remove_left_behind(parent: Path) -> None:
    for directory in parent.glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another user's, or not one of ours
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:  # its maker is alive
            pass
        finally:
            os.close(descriptor)


def _parent(env: Mapping[str, str]) -> str:
    for candidate in (env.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        if candidate and len(candidate.encode()) <= _MAX_PATH_BYTES and os.access(candidate, os.W_OK | os.X_OK):
            return candidate
    return "/tmp"
