"""Fields of requests that mean nothing here: each is logged once, for whoever wonders why it has no effect."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice

from router.openai.field_types import shown

MAX_NAMES = 256
"""Names remembered, and lines logged, at most: names are the clients' to choose."""

logger = logging.getLogger(__name__)


class UnknownFields:
    """Logs each name once."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._seen: set[str] = set()

    def notice(self, names: Iterable[str]) -> None:
        """Log those of ``names`` that have not been logged yet, as far as there is room to remember them."""
        some = map(shown, islice(names, self._max_names))  # a body may have a million
        new = (name for name in some if name not in self._seen)
        for name in islice(new, self._max_names - len(self._seen)):
            self._seen.add(name)
            logger.warning("requests have a field %s, which is unknown here and ignored", name)
