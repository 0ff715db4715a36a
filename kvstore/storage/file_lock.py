"""File locks between processes. The kernel releases them when a process ends."""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvrelay.errors import StorageUnavailableError

_RETRY_S = 0.0005


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock, or change a held one to this kind, without waiting. Return whether that succeeded."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


class FileLock:
    """Exclusive between the threads of this process and all processes that lock the same file."""

    def __init__(self, fd: int, timeout_s: float) -> None:
        self._fd = fd
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock. Blocks; raises StorageUnavailableError if it is not free in time.

        The kernel has no lock with a timeout, and the process that holds it may be stopped. Hence the retries.
        """
        deadline = time.monotonic() + self._timeout_s
        if not self._mutex.acquire(timeout=self._timeout_s):
            raise StorageUnavailableError(f"the index was busy in this process for {self._timeout_s} s")
        try:
            while not try_lock(self._fd):
                if time.monotonic() > deadline:
                    raise StorageUnavailableError(f"another process has held the index for {self._timeout_s} s")
                time.sleep(_RETRY_S)
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._mutex.release()
