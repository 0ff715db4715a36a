"""ASGI helpers: send answers, detect that the client has disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec
from starlette.types import Receive, Send

from kvrelay.runtime.time_slice import TimeSlice
from router.http.error_format import error_body
from router.openai.errors import AnswerError

Headers = Iterable[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


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


async def send_events(send: Send, events: AsyncIterator[bytes], headers: Headers = ()) -> None:
    """Send a stream of events. Nothing is sent before the first one, so an error before it can have its own status."""
    first = await anext(events)
    await send({"type": "http.response.start", "status": 200, "headers": [*_EVENT_STREAM, *headers]})
    await send({"type": "http.response.body", "body": first, "more_body": True})
    async for item in events:
        await send({"type": "http.response.body", "body": item, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def watching(receive: Receive, on_disconnect: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``on_disconnect`` if the client disconnects inside the context. The body must have been read."""
    watcher = asyncio.create_task(_watch(receive, on_disconnect))
    try:
        yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


async def _watch(receive: Receive, on_disconnect: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    on_disconnect()
