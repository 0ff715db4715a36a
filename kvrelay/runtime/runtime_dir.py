"""A directory for the ipc sockets of one cluster on one host."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kvrelay.errors import ConfigError

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
    that killed processes of this user left behind are removed first. Raises ConfigError if a given one is not private.
    """
    if given := env.get(VARIABLE):
        _require_private(Path(given))
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


def _require_private(directory: Path) -> None:
    """Raise ConfigError if other users can enter ``directory``: they could speak to a node as its messager."""
    try:
        status = directory.stat()
    except OSError as error:
        raise ConfigError([f"{VARIABLE}: cannot use {directory}: {error.strerror}"]) from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError([f"{VARIABLE}: {directory} is not private to this user; run chmod 700 {directory}"])


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


def new_socket_file(directory: Path, name: str) -> Path:
    """Return the path of a new ipc socket of the process ``name`` in ``directory``.

    It is random and does not contain the incarnation: /proc/net/unix shows it to all users.
    """
    return directory / f"{name}.{secrets.token_hex(4)}"


def _parent(env: Mapping[str, str]) -> str:
    for candidate in (env.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        if candidate and len(candidate.encode()) <= _MAX_PATH_BYTES and os.access(candidate, os.W_OK | os.X_OK):
            return candidate
    return "/tmp"
