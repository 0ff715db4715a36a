"""Unknown fields of requests: each name is logged once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice

from router.openai.field_types import shown

MAX_NAMES = 256
"""Maximum names remembered and logged, because clients choose the names."""

logger = logging.getLogger(__name__)


class UnknownFields:
    """Logs each name once."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._seen: set[str] = set()

    def notice(self, names: Iterable[str]) -> None:
        """Log those of ``names`` that have not been logged yet, up to the maximum."""
        some = map(shown, islice(names, self._max_names))  # a body may have a million
        new = (name for name in some if name not in self._seen)
        for name in islice(new, self._max_names - len(self._seen)):
            self._seen.add(name)
            logger.warning("unknown request field %s is ignored", name)
