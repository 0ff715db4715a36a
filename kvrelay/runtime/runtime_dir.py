"""A directory for the ipc sockets of one cluster on one host."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "KVRELAY_RUNTIME_DIR"
"""Environment variable with the directory of the ipc sockets."""

_MAX_PATH_BYTES = 64
"""Maximum length of the directory: an ipc path has at most 107 bytes, and sockets need names."""


@contextmanager
def runtime_dir(env: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Return a context with a directory that only this user can access. It is removed at the end.

    If a parent process made one already (``KVRELAY_RUNTIME_DIR``) that is it, and its maker removes it. The name is
    random, so one left behind by a killed process does no harm.
    """
    if given := env.get(VARIABLE):
        yield Path(given)
        return
    path = Path(tempfile.mkdtemp(prefix="kvrelay-", dir=_parent(env)))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


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
