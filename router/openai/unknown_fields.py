"""Unknown fields of requests: each name is logged once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice

from router.openai.field_types import MAX_SHOWN_CHARS, shown

MAX_NAMES = 256
"""Maximum names remembered and logged, because clients choose the names."""

_MAX_CHARS = MAX_SHOWN_CHARS + 1  # so that what is cut is shown as cut

logger = logging.getLogger(__name__)


class UnknownFields:
    """Logs each name once. In a preparation worker names are collected for the router, which does that for all."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._seen: set[str] = set()
        self._collected: list[str] | None = None

    def collect(self) -> None:
        """Log nothing from here on."""
        self._collected = []

    def take(self) -> list[str]:
        """Return the names collected since the last time, each once in the life of the process, and cut if long."""
        taken, self._collected = self._collected or [], []
        return taken

    def notice(self, names: Iterable[str]) -> None:
        """Log those of ``names`` that have not been logged yet, up to the maximum."""
        some = (name[:_MAX_CHARS] for name in islice(names, self._max_names))  # a body may have a million
        new = (name for name in some if name not in self._seen)
        for name in islice(new, self._max_names - len(self._seen)):
            self._seen.add(name)
            if self._collected is None:
                logger.warning("unknown request field %s is ignored", shown(name))
            else:
                self._collected.append(name)
