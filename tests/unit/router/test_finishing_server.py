"""A router that stops: it accepts no connection, and answers what comes on those there are."""

from __future__ import annotations

import asyncio
import json
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable

import pytest
import uvloop
from fake_nodes import FakeCluster, Script, fake_cluster, until

from router.http import server

BODY = {"prompt": "a", "max_tokens": 40, "seed": 0}


def run(scenario: Callable[[FakeCluster], Awaitable[None]], pace_s: float = 0.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60), fake_cluster(Script(pace_s=pace_s)) as cluster:
            await scenario(cluster)

    uvloop.run(bounded())


class Client:
    """A connection that is kept open."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, cluster: FakeCluster) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", int(cluster.url.rpartition(":")[2])))

    def say(self, path: str, body: object = None) -> None:
        content = json.dumps(body).encode() if body else b""
        head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        self.writer.write(head.encode() + content)

    async def answer(self) -> tuple[bytes, bytes]:
        """Return head and body of the next answer."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        (length,) = (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        return head, await self._reader.readexactly(length)

    async def assert_closed(self) -> None:
        assert await self._reader.read() == b""
        self.writer.close()


async def stopping(cluster: FakeCluster) -> asyncio.Task[object]:
    """Stop the router; return what ends with it."""
    ended = asyncio.create_task(cluster.service.ended.wait())
    cluster.service.stop()
    await until(cluster.service.machine.unready_reason)
    return ended


def test_what_comes_on_open_connections_is_answered_and_new_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_GRACE_S", 3600.0)

    async def scenario(cluster: FakeCluster) -> None:
        busy, kept, fresh, slow = [await Client.connect(cluster) for _ in range(4)]
        kept.say("/health")
        head, _ = await kept.answer()
        assert b"connection: close" not in head
        busy.say("/v1/completions", BODY)
        slow.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-")
        await until(lambda: len(cluster.service.machine.requests) == 1 and len(cluster.connections) >= 4)
        ended = await stopping(cluster)
        with pytest.raises(ConnectionRefusedError):
            await Client.connect(cluster)
        for client in (kept, fresh):
            client.say("/v1/completions", BODY)
        content = json.dumps(BODY).encode()
        slow.writer.write(b"Length: %d\r\n\r\n%b" % (len(content), content))
        for client in (busy, kept, fresh, slow):
            head, body = await client.answer()
            assert json.loads(body)["usage"]["completion_tokens"] == 40
            assert b"connection: close" in head
            await client.assert_closed()
        await ended

    run(scenario, pace_s=0.005)


def test_an_idle_connection_is_closed_after_a_while_and_a_request_on_its_way_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "IDLE_GRACE_S", 0.1)

    async def scenario(cluster: FakeCluster) -> None:
        idle, late = [await Client.connect(cluster) for _ in range(2)]
        late.writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        await until(lambda: any(connection._is_receiving for connection in cluster.connections))
        ended = await stopping(cluster)
        await idle.assert_closed()
        late.writer.write(b"\r\n")
        head, _ = await late.answer()
        assert head.startswith(b"HTTP/1.1 200")
        await late.assert_closed()
        await ended

    run(scenario)


def test_a_request_that_comes_when_the_router_has_ended_is_refused_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection may be open still: clients are given time to read."""
    monkeypatch.setattr(server, "IDLE_GRACE_S", 3600.0)

    async def scenario(cluster: FakeCluster) -> None:
        clients = [await Client.connect(cluster) for _ in range(2)]
        await until(lambda: len(cluster.connections) == 2)
        cluster.service.stop()
        await (await stopping(cluster))
        for client, stream in zip(clients, (False, True), strict=True):
            client.say("/v1/completions", BODY | {"stream": stream})
            head, body = await client.answer()
            assert head.startswith(b"HTTP/1.1 503 ")
            assert json.loads(body)["error"]["code"] == "no_node_available"
            await client.assert_closed()

    run(scenario)


def test_a_server_that_has_not_begun_has_nothing_to_finish() -> None:
    async def finish() -> None:
        with socket.create_server(("127.0.0.1", 0)):
            unstarted = server.http_server(None, "127.0.0.1", 0)  # type: ignore[arg-type]
            await asyncio.wait_for(unstarted.finish(), 60)

    uvloop.run(finish())
