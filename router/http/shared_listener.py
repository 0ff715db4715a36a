"""An HTTP server that shares its listening socket with other processes."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import cast

from kvrelay.runtime.logging import log_event
from router.http.server import HttpServer

PAUSE_S = 0.1
"""Seconds without accepting after the system refused a connection, because descriptors or memory are short."""


class Acceptor:
    """Accepts one connection per turn of the loop, so that a busy process leaves connections to the others.

    asyncio's own servers accept all that wait, and then serve them while the other processes have none. A socket for
    each process (SO_REUSEPORT) would balance too, but what waits in the socket of a process is lost when it ends.
    """

    def __init__(self, server: HttpServer, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        kind = cast(Callable[..., asyncio.Protocol], server.config.http_protocol_class)
        self._make_protocol = partial(
            kind,
            config=server.config,
            server_state=server.server_state,
            app_state=server.lifespan.state,
        )
        self._tls = server.config.ssl
        self._listener = listener
        self._opening: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept connections from now on."""
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Accept no more connections. If no other process has the socket, they are refused."""
        if self._pause is not None:
            self._pause.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def wait_closed(self) -> None:
        """Return when every connection that was accepted has its protocol."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # another process has it, or it is gone
            return
        except OSError as error:
            log_event("error", "cannot accept connections", {"reason": error.strerror})
            self._loop.remove_reader(self._listener)
            self._pause = self._loop.call_later(PAUSE_S, self.start)
            return
        task = self._loop.create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with suppress(OSError, ssl.SSLError):  # the client has left, or does not speak TLS
            await self._loop.connect_accepted_socket(self._make_protocol, connection, ssl=self._tls)


class SharingServer(HttpServer):
    """A server whose one socket other processes accept from too."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections at the only one of ``sockets``."""
        (listener,) = cast(Sequence[socket.socket], sockets)
        await self.lifespan.startup()
        acceptor = Acceptor(self, listener)
        acceptor.start()
        self.servers = [cast(asyncio.base_events.Server, acceptor)]
        self.started = True
