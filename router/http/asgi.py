"""The few things the endpoints need of ASGI: read a JSON body, answer, notice that the client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
from starlette.types import Receive, Send

from kvrelay.core.errors import InvalidRequestError
from kvrelay.core.messages.base import ErrorInfo
from router.openai.errors import AnswerError
from router.openai.generation import ClientLeftError

Headers = Iterable[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def read_body(receive: Receive, max_body_bytes: int) -> bytes:
    """Return the request's body.

    Raises AnswerError (413) if it is longer than ``max_body_bytes``, ClientLeftError if it never comes to its end.
    """
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > max_body_bytes:
            reason = f"the body is longer than {max_body_bytes} bytes"
            raise AnswerError(ErrorInfo(code="request_too_large", message=reason, http_status=413))
    return bytes(body)


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``. Raises InvalidRequestError if there is none."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequestError("the body should be a JSON object")
    return content


async def send_json(send: Send, body: object, status: int = 200, headers: Headers = ()) -> None:
    """Answer with ``body``."""
    content = msgspec.json.encode(body)
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_JSON, length, *headers]})
    await send({"type": "http.response.body", "body": content})


async def send_error(send: Send, error: AnswerError, headers: Headers = ()) -> None:
    """Answer with ``error``."""
    await send_json(send, error.body, error.status, [*error.headers, *headers])


async def send_events(send: Send, events: AsyncIterator[bytes], headers: Headers = ()) -> None:
    """Answer with a stream of events. Nothing is sent before the first: until then an error may have its own status."""
    first = await anext(events)
    await send({"type": "http.response.start", "status": 200, "headers": [*_EVENT_STREAM, *headers]})
    await send({"type": "http.response.body", "body": first, "more_body": True})
    async for item in events:
        await send({"type": "http.response.body", "body": item, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def watching(receive: Receive, on_gone: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``on_gone`` if the client closes its connection meanwhile. The body must have been read."""
    watcher = asyncio.create_task(_watch(receive, on_gone))
    try:
        yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


async def _watch(receive: Receive, on_gone: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    on_gone()
