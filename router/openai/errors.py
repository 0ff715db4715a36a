"""Errors in OpenAI's format."""

from __future__ import annotations

import math

from kvrelay.errors import KVRelayError
from kvrelay.protocol.messages.base import ErrorInfo
from router.events import RequestErrored


class AnswerError(Exception):
    """An error answer with its HTTP status."""

    def __init__(
        self,
        error: ErrorInfo,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        closes_connection: bool = False,
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.param = param
        self.retry_after_s = retry_after_s
        self.closes_connection = closes_connection

    @classmethod
    def of(cls, cause: KVRelayError | RequestErrored) -> AnswerError:
        """Return the answer for an error."""
        errored = RequestErrored.of(cause) if isinstance(cause, KVRelayError) else cause
        return cls(errored.error, param=errored.param, retry_after_s=errored.retry_after_s)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.error.http_status

    @property
    def body(self) -> dict[str, object]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        return {
            "error": {
                "message": self.error.message,
                "type": _type_of(self.status),
                "param": self.param,
                "code": self.error.code,
            }
        }

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """``Retry-After`` in whole seconds, if a retry may help; ``Connection: close`` if the connection is closed."""
        headers = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        if self.closes_connection:
            headers.append((b"connection", b"close"))
        return headers


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
