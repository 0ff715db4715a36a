"""Servers that accept from one socket: each gets its part, and no connection is lost while one of them is there."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import httpx
import uvloop
from fake_nodes import until
from starlette.types import Receive, Scope, Send

from router.http.server import http_server
from router.http.shared_listener import SharingServer

NUM_CONNECTIONS = 32


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(listener: socket.socket) -> AsyncIterator[SharingServer]:
    """Run a server with a descriptor of its own, as another process has."""
    own = listener.dup()
    own.setblocking(False)
    server = http_server(app, "127.0.0.1", 0, kind=SharingServer)
    assert isinstance(server, SharingServer)
    task = asyncio.create_task(server.serve([own]))
    await until(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        await task


async def ask(listener: socket.socket) -> str:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    async with httpx.AsyncClient(timeout=None, trust_env=False) as http:
        return (await http.get(url)).text


def test_connections_that_come_at_once_are_shared() -> None:
    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=NUM_CONNECTIONS) as listener, ExitStack() as clients:
            async with serving(listener) as a, serving(listener) as b:
                for _ in range(NUM_CONNECTIONS):
                    clients.enter_context(socket.create_connection(listener.getsockname()))
                counts = [server.server_state.connections for server in (a, b)]
                await until(lambda: sum(map(len, counts)) == NUM_CONNECTIONS)
                assert min(map(len, counts)) >= NUM_CONNECTIONS // 4
                for connections in counts:
                    for connection in connections:
                        its = connection.transport.get_extra_info("socket")
                        assert its.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                clients.close()

    uvloop.run(check())


def test_one_ends_and_the_other_serves() -> None:
    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with serving(listener):
                async with serving(listener):
                    assert await asyncio.gather(*(ask(listener) for _ in range(8))) == ["ok"] * 8
                assert await asyncio.gather(*(ask(listener) for _ in range(8))) == ["ok"] * 8
            waiting = asyncio.create_task(ask(listener))  # until there is a server again
            async with serving(listener):
                assert await waiting == "ok"

    uvloop.run(check())


class Refusing(socket.socket):
    """A listening socket whose first ``accept`` fails: too many open files."""

    num_refused = 0

    def accept(self) -> tuple[socket.socket, object]:
        if not self.num_refused:
            self.num_refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_a_server_goes_on_when_descriptors_were_short() -> None:
    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            refusing = Refusing(fileno=listener.dup().detach())
            refusing.setblocking(False)
            server = http_server(app, "127.0.0.1", 0, kind=SharingServer)
            task = asyncio.create_task(server.serve([refusing]))
            assert await ask(listener) == "ok"
            assert refusing.num_refused == 1
            server.should_exit = True
            await task

    uvloop.run(check())
