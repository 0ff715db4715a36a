"""An HTTP/1.1 client that notes when each part of an answer arrives.

A load generator must cost less than what it measures. Parsing is httptools', as in the router; between the socket and
the reader of an answer there are two function calls. ``benchmarks/bench_client.py`` compares it with other clients.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from kvrelay.bench.errors import BenchError

BodySink = Callable[[bytes, float], None]
"""Takes a part of a body and when it arrived, in seconds of ``time.perf_counter``."""


@dataclass(slots=True)
class Answer:
    """The head of an answer; the body goes to a sink."""

    status: int = 0
    reason: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Client:
    """Connections to one server. Idle ones are used again; there is no limit.

    ``url`` is the base of all paths. Raises BenchError if it is not an http or https URL.
    """

    def __init__(self, url: str, headers: Mapping[str, str] = {}) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchError(f"{url!r} should be http://HOST:PORT")
        self.url = url.rstrip("/")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._base = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": parts.netloc, **headers}.items())
        self._idle: list[_Connection] = []

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def send(
        self, method: str, path: str, body: bytes, sink: BodySink, headers: Mapping[str, str] = {}
    ) -> Answer:
        """Send one request and return the head of its answer when the body is complete.

        Raises OSError if there is no connection or it breaks.
        """
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        kind = "Content-Type: application/json\r\n" if body else ""
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}{more}{kind}Content-Length: {len(body)}\r\n\r\n"
        connection = await self._connection()
        try:
            answer = await connection.exchange(head.encode() + body, sink)
        except BaseException:
            connection.close()
            raise
        if connection.is_reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def read(self, method: str, path: str, body: bytes = b"") -> tuple[Answer, bytes]:
        """Send one request and return the answer with its whole body."""
        parts: list[bytes] = []
        answer = await self.send(method, path, body, lambda data, _: parts.append(data))
        return answer, b"".join(parts)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(
            _Connection, self._host, self._port, ssl=self._tls, server_hostname=self._host if self._tls else None
        )
        return made


class _Connection(asyncio.Protocol):
    """One connection, with at most one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._sink: BodySink = _ignore
        self._answer = Answer()
        self._now = 0.0
        self.is_reusable = True

    async def exchange(self, request: bytes, sink: BodySink) -> Answer:
        """Send ``request``; return when its answer is complete."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._answer, self._sink = Answer(), sink
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._done, self._sink = None, _ignore
        return self._answer

    def close(self) -> None:
        """Close it."""
        self.is_reusable = False
        if self._transport is not None:
            self._transport.close()

    # ------------------------------------------------------------ asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._done is None:
            self.close()  # nobody has asked for anything
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(OSError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        head = self._answer
        if exc is None and head.status and not {"content-length", "transfer-encoding"} & head.headers.keys():
            self.on_message_complete()  # a body whose end is the end of the connection
        else:
            self._fail(OSError("the server closed the connection before the end of its answer"))

    # ------------------------------------------------------------ httptools calls these

    def on_status(self, reason: bytes) -> None:
        self._answer.reason = reason.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self.is_reusable = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._sink(body, self._now)

    def on_message_complete(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: OSError) -> None:
        self.is_reusable = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


def _ignore(_: bytes, __: float) -> None:
    """Take the rest of an answer that nobody waits for."""
