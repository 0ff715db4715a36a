"""Limit on the memory of all request bodies together, from the first byte received until they are tokenized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.runtime.logging import log_event
from router.openai.errors import AnswerError
from router.preparation import INLINE_BYTES

RETRY_AFTER_S = 5.0
LOG_INTERVAL_S = 60.0


class BodyMemory:
    """Counts the bytes of long bodies. Short ones are not counted and are accepted even at the limit."""

    def __init__(self, max_bytes: int, now: Callable[[], float]) -> None:
        self._max_bytes = max_bytes
        self._now = now
        self._next_log_s = 0.0
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Add ``num_bytes``. Raises AnswerError (503) if the limit would be exceeded."""
        if self.num_bytes + num_bytes > self._max_bytes:
            self._log()
            reason = f"long bodies take {self._max_bytes} bytes (router.max_total_body_bytes); try again later"
            error = ErrorInfo(code="too_many_long_bodies", message=reason, http_status=503)
            raise AnswerError(error, retry_after_s=RETRY_AFTER_S, closes_connection=True)
        self.num_bytes += num_bytes

    def _log(self) -> None:
        if self._now() >= self._next_log_s:
            self._next_log_s = self._now() + LOG_INTERVAL_S
            limits = {"max_total_body_bytes": self._max_bytes}
            log_event("warning", "too many long bodies at once: more are answered 503", limits)


class BodyShare:
    """Context manager for the bytes counted for one body. They are released on exit."""

    __slots__ = ("_memory", "num_bytes")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.num_bytes -= self.num_bytes

    def grow_to(self, num_bytes: int) -> None:
        """Count the body at its new length ``num_bytes``. Raises AnswerError (503) if the limit would be exceeded."""
        if num_bytes > INLINE_BYTES:
            self._memory.take(num_bytes - self.num_bytes)
            self.num_bytes = num_bytes
