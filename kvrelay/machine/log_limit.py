"""Limits log lines that other processes can cause."""

from __future__ import annotations

from collections.abc import Hashable

INTERVAL_S = 60.0
MAX_KEYS = 256


class LogLimit:
    """Permits one log line per key and minute, for at most ``MAX_KEYS`` keys."""

    def __init__(self) -> None:
        self._logged: set[Hashable] = set()
        self._ends_s = 0.0

    def permits(self, key: Hashable, now: float) -> bool:
        """Return whether a line for ``key`` may be logged at ``now`` (seconds)."""
        if now >= self._ends_s:
            self._ends_s = now + INTERVAL_S
            self._logged.clear()
        if key in self._logged or len(self._logged) >= MAX_KEYS:
            return False
        self._logged.add(key)
        return True
