"""How many connections a process may have: its limit of file descriptors."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress

from kvrelay.runtime.logging import log_event

_MAX_SPARE = 64


def raise_limit() -> None:
    """Let this process have as many descriptors as the system allows it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems have a lower limit that they do not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Descriptors:
    """Tells when hardly any descriptors are left. Some are kept for nodes, and to turn clients away politely.

    The kernel gives the lowest free number, so a connection's own number says how many there are.
    """

    def __init__(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = sys.maxsize if limit == resource.RLIM_INFINITY else limit
        self._spare = min(_MAX_SPARE, self._limit // 4)
        self._is_full = False

    def allow(self, descriptor: int) -> bool:
        """Tell whether a connection with this descriptor may stay; log when that changes."""
        is_full = descriptor >= self._limit - self._spare
        if is_full and not self._is_full:
            log_event("error", "too many connections: new ones are answered 503", {"max_descriptors": self._limit})
        elif self._is_full and not is_full:
            log_event("info", "connections are taken again", {"max_descriptors": self._limit})
        self._is_full = is_full
        return not is_full

    def is_urgent(self, descriptor: int) -> bool:
        """Tell whether so few are left that a connection turned away must go at once."""
        return descriptor >= self._limit - self._spare // 2
