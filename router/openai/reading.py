"""Unexpected errors while a request is read become 400, because the same request would fail again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kvrelay.errors import InvalidRequestError, KVRelayError

logger = logging.getLogger(__name__)


@contextmanager
def reading(reason: str, param: str | None = None) -> Iterator[None]:
    """Convert an unexpected exception to InvalidRequestError(``reason``), and log it."""
    try:
        yield
    except KVRelayError:
        raise
    except Exception as error:
        logger.exception("%s", reason)
        raise InvalidRequestError(reason, param=param) from error
