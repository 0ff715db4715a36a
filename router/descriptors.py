"""The limit of file descriptors, which bounds the number of connections of a process."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress

from kvrelay.runtime.logging import log_event

_MAX_SPARE = 64


def raise_limit() -> None:
    """Raise the soft limit of file descriptors to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems have a lower limit that they do not report
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Descriptors:
    """Detects when few descriptors are left. Some are reserved for nodes and for 503 responses to clients.

    The kernel assigns the lowest free number, so a connection's descriptor indicates how many are in use.
    """

    def __init__(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = sys.maxsize if limit == resource.RLIM_INFINITY else limit
        self._spare = min(_MAX_SPARE, self._limit // 4)
        self._is_full = False

    def allow(self, descriptor: int) -> bool:
        """Return whether a connection with this descriptor may stay open; log when that changes."""
        is_full = descriptor >= self._limit - self._spare
        if is_full and not self._is_full:
            log_event("error", "too many connections: new ones are answered 503", {"max_descriptors": self._limit})
        elif self._is_full and not is_full:
            log_event("info", "connections are taken again", {"max_descriptors": self._limit})
        self._is_full = is_full
        return not is_full

    def is_urgent(self, descriptor: int) -> bool:
        """Return whether so few are left that a refused connection must be closed at once."""
        return descriptor >= self._limit - self._spare // 2
