"""ASGI helpers: send answers, detect that the client has disconnected."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.runtime.logging import Event
from kvrelay.runtime.time_slice import TimeSlice
from router.http.error_format import error_body
from router.openai.errors import AnswerError

logger = logging.getLogger(__name__)

Headers = Iterable[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_SEPARATORS = [(separator.encode(), b"\\u%04x" % ord(separator)) for separator in "\x85\u2028\u2029"]


async def send_json(send: Send, body: object, status: int = 200, headers: Headers = ()) -> None:
    """Send ``body`` as the answer."""
    await send_body(send, msgspec.json.encode(body), status, headers)


async def send_body(send: Send, content: bytes, status: int = 200, headers: Headers = ()) -> None:
    """Send encoded JSON as the answer."""
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_JSON, length, *headers]})
    await send({"type": "http.response.body", "body": content})


async def send_pieces(send: Send, pieces: Sequence[bytes], headers: Headers = ()) -> None:
    """Answer with JSON in ``pieces``, at least one: to put together what is long would take the loop too long."""
    length = (b"content-length", str(sum(map(len, pieces))).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [_JSON, length, *headers]})
    time_slice = TimeSlice()
    for index, piece in enumerate(pieces, 1):
        await send({"type": "http.response.body", "body": piece, "more_body": index < len(pieces)})
        await time_slice.pause()


async def send_error(send: Send, error: AnswerError, headers: Headers = (), path: str = "") -> None:
    """Send ``error`` as the answer, in the format of the API that ``path`` belongs to."""
    await send_json(send, error_body(error, path), error.status, [*error.headers, *headers])


async def send_internal_error(send: Send, path: str, request_id: str = "", headers: Headers = ()) -> None:
    """Log the exception that is being handled, and answer that it happened."""
    fields = {"path": path, "request_id": request_id} if request_id else {"path": path}
    logger.exception(Event("error while serving", fields))
    internal = AnswerError(ErrorInfo(code="internal_error", message="internal error, see the router's log"))
    await send_error(send, internal, headers, path)


def in_single_lines(events: bytes) -> bytes:
    """Return encoded events with the line separators of Unicode that JSON leaves in strings as escapes.

    They end no line of an event stream, but they do for clients that use ``str.splitlines``, as httpx's ``iter_lines``.
    """
    if not events.isascii():
        for separator, escape in _SEPARATORS:
            events = events.replace(separator, escape)
    return events


async def send_events(send: Send, events: AsyncIterator[bytes], headers: Headers = ()) -> None:
    """Send a stream of events. Nothing is sent before the first one, so an error before it can have its own status."""
    first = in_single_lines(await anext(events))
    await send({"type": "http.response.start", "status": 200, "headers": [*_EVENT_STREAM, *headers]})
    await send({"type": "http.response.body", "body": first, "more_body": True})
    async for item in events:
        await send({"type": "http.response.body", "body": in_single_lines(item), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


CONNECTION = "kvrelay.connection"
"""Key of a scope: the ``Connection``, with our server."""


class Connection(Protocol):
    """What tells of the client's end of a connection."""

    def watch(self, on_disconnect: Callable[[], None]) -> None:
        """Call ``on_disconnect`` when the client disconnects, at once if it has."""

    def unwatch(self, on_disconnect: Callable[[], None]) -> None:
        """Do not call it any more."""


class Watching:
    """A context in which ``on_disconnect`` is called if the client disconnects. The body must have been read.

    A server that is not ours is asked by a task, which costs more.
    """

    def __init__(self, scope: Scope, receive: Receive, on_disconnect: Callable[[], None]) -> None:
        self._connection: Connection | None = scope.get(CONNECTION)
        self._receive = receive
        self._on_disconnect = on_disconnect
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._connection is not None:
            self._connection.watch(self._on_disconnect)
        else:
            self._watcher = asyncio.create_task(_wait_for_disconnect(self._receive, self._on_disconnect))

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.unwatch(self._on_disconnect)
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher


async def _wait_for_disconnect(receive: Receive, on_disconnect: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    on_disconnect()
