"""A node's HTTP server for ``/metrics``, on the node's loop.

The loop also runs the node's steps, so no client may take much of it: connections are accepted one after another with
a pause between them, a few are open at a time and none for long, a request is short, and the text is made for all who
ask, so seldom that it takes no more than ``MAX_SHARE`` of the loop's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
from collections.abc import AsyncIterator, Callable

from kvrelay.addresses import is_loopback, listen_at, netloc
from kvrelay.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
"""Connections open at a time. More wait in the kernel's queue."""

ACCEPT_PAUSE_S = 0.01
"""Seconds from one connection to the next: at most a hundred connections a second."""

TIMEOUT_S = 5.0
"""Seconds a client has to send its request and to take the answer."""

TEXT_AGE_S = 0.05
"""Seconds for which a text is used again, at least."""

MAX_SHARE = 0.02
"""Share of the loop's time that goes to making texts, at most."""

_MAX_REQUEST_BYTES = 8192
_MAX_READS = 16
"""Parts in which a request may arrive: each costs the loop a turn."""

_BACKLOG = 16
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class MetricsServer:
    """Serves ``/metrics`` and ``/health`` to GET and HEAD. ``exposition`` returns the text, ``now`` the time in
    seconds. One request per connection."""

    def __init__(self, exposition: Callable[[], bytes], now: Callable[[], float]) -> None:
        self._exposition = exposition
        self._now = now
        self._text = b""
        self._fresh_until_s = -math.inf
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, key: str, host: str, port: int) -> AsyncIterator[None]:
        """Serve at ``host:port`` for the context. Raises ConfigError that names ``key`` if it is in use."""
        try:
            listener = listen_at(host, port, _BACKLOG)
        except OSError as error:
            raise ConfigError([f"{key}: cannot listen at {netloc(host, port)}: {error.strerror}"]) from error
        if not is_loopback(host):
            logger.warning("metrics at %s can be read by whoever reaches it", netloc(host, port))
        with listener:
            listener.setblocking(False)
            accepting = asyncio.create_task(self._accept(listener))
            try:
                yield
            finally:
                tasks = [accepting, *self._tasks]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._slots.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:  # too many files are open, or the client has gone again
                self._slots.release()
            else:
                task = asyncio.create_task(self._serve(connection))
                self._tasks.add(task)
                task.add_done_callback(self._served)
            await asyncio.sleep(ACCEPT_PAUSE_S)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._slots.release()

    async def _serve(self, connection: socket.socket) -> None:
        """Answer the one request of ``connection``."""
        loop = asyncio.get_running_loop()
        with connection, contextlib.suppress(OSError, TimeoutError):
            connection.setblocking(False)
            async with asyncio.timeout(TIMEOUT_S):
                request = b""
                for _ in range(_MAX_READS):
                    data = await loop.sock_recv(connection, _MAX_REQUEST_BYTES)
                    request += data
                    if not data or b"\r\n\r\n" in request or len(request) > _MAX_REQUEST_BYTES:
                        break
                await loop.sock_sendall(connection, self._answer(request))

    def _answer(self, request: bytes) -> bytes:
        head, end, _ = request.partition(b"\r\n\r\n")
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        path, _, version = rest.partition(b" ")
        if not end or not version.startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"this server takes short HTTP/1.1 requests\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"GET or HEAD\n")
        match path.partition(b"?")[0]:
            case b"/metrics":
                answer = self._metrics()
            case b"/health":
                answer = _response("200 OK", b"ok\n")
            case _:
                answer = _response("404 Not Found", b"/metrics is here\n")
        return answer if method == b"GET" else answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    def _metrics(self) -> bytes:
        now = self._now()
        if now >= self._fresh_until_s:
            try:
                self._text = self._exposition()
            except Exception:
                logger.exception("the metrics cannot be read")
                return _response("500 Internal Server Error", b"see the node's log\n")
            made_s = self._now()
            self._fresh_until_s = made_s + max(TEXT_AGE_S, (made_s - now) / MAX_SHARE)
        return _response("200 OK", self._text, _TEXT)


def _response(status: str, body: bytes, content_type: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
