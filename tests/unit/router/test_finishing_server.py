"""A router that stops: it accepts no connection, and answers what comes on those there are."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable

import pytest
import uvloop
from fake_nodes import FakeCluster, Script, fake_cluster, until, until_refused

from router import machine
from router.http import protocol, server

BODY = {"prompt": "a", "max_tokens": 40, "seed": 0}


def run(scenario: Callable[[FakeCluster], Awaitable[None]], pace_s: float = 0.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60), fake_cluster(Script(pace_s=pace_s)) as cluster:
            await scenario(cluster)

    uvloop.run(bounded())


def request(path: str, body: object = None) -> bytes:
    content = json.dumps(body).encode() if body else b""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


class Client:
    """A connection that is kept open."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, cluster: FakeCluster) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", cluster.port))

    def say(self, path: str, body: object = None) -> None:
        self.writer.write(request(path, body))

    async def until(self, end: bytes) -> bytes:
        """Return what comes up to ``end``."""
        return await self._reader.readuntil(end)

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
    monkeypatch.setattr(machine, "LAST_CLIENTS_S", 3600.0)

    async def scenario(cluster: FakeCluster) -> None:
        busy, kept, fresh, slow = [await Client.connect(cluster) for _ in range(4)]
        kept.say("/health")
        head, _ = await kept.answer()
        assert b"connection: close" not in head
        busy.say("/v1/completions", BODY)
        slow.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-")
        await until(lambda: len(cluster.service.machine.requests) == 1 and len(cluster.connections) >= 4)
        ended = await stopping(cluster)
        await until_refused("127.0.0.1", cluster.port)
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


@pytest.mark.parametrize("is_early", [False, True], ids=["after its end", "before its end"])
def test_a_connection_whose_stream_had_begun_takes_one_more_request(
    is_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client has not been told that it is the last: it may ask again as soon as the stream ends, or before."""
    monkeypatch.setattr(server, "IDLE_GRACE_S", 3600.0)

    async def scenario(cluster: FakeCluster) -> None:
        client = await Client.connect(cluster)
        client.say("/v1/completions", BODY | {"stream": True})
        assert b"connection: close" not in await client.until(b"\r\n\r\n")
        ended = await stopping(cluster)
        await until(lambda: cluster.connections[0]._is_last)
        if is_early:
            client.say("/v1/completions", BODY)
        await client.until(b"0\r\n\r\n")
        if not is_early:
            client.say("/v1/completions", BODY)
        head, body = await client.answer()
        assert json.loads(body)["usage"]["completion_tokens"] == 40
        assert b"connection: close" in head
        await client.assert_closed()
        await ended

    run(scenario, pace_s=0.005)


def test_a_connection_that_is_accepted_as_the_router_stops_is_served() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        with socket.socket() as late:

            def ask() -> None:
                late.connect(("127.0.0.1", cluster.port))
                late.sendall(request("/v1/completions", BODY))
                late.setblocking(False)

            # The loop accepts it after the router has begun to stop, and before the server has.
            cluster.service.stop()
            loop = asyncio.get_running_loop()
            loop.call_soon(ask)
            await cluster.service.ended.wait()
            assert (await loop.sock_recv(late, 1 << 16)).startswith(b"HTTP/1.1 200 ")

    run(scenario)


def test_an_idle_client_of_tls_that_does_not_read_does_not_hold_up_the_router(
    certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a connection in its pool, and looks at it when it asks next."""
    monkeypatch.setattr(server, "IDLE_GRACE_S", 0.0)
    monkeypatch.setattr(protocol, "LINGER_S", 0.0)
    monkeypatch.setattr(machine, "LAST_CLIENTS_S", 3600.0)
    context = ssl.create_default_context(cafile=certificate[0])

    def connect(port: int) -> ssl.SSLSocket:
        client = context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1")
        client.sendall(request("/health"))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        return client

    async def bounded() -> None:
        tls_certificate, tls_key = certificate
        async with asyncio.timeout(60), fake_cluster(tls_certificate=tls_certificate, tls_key=tls_key) as cluster:
            with await asyncio.to_thread(connect, cluster.port):
                await (await stopping(cluster))
                assert not cluster.connections

    uvloop.run(bounded())


def test_what_has_come_is_read_before_an_idle_connection_is_closed() -> None:
    """The loop may not have run since: then the time is over before it has read."""

    async def scenario(cluster: FakeCluster) -> None:
        client = await Client.connect(cluster)
        await until(lambda: cluster.connections)
        own = client.writer.get_extra_info("socket").fileno()
        os.write(own, request("/v1/completions", BODY))
        cluster.connections[0].timeout_keep_alive_handler()
        head, _ = await client.answer()
        assert head.startswith(b"HTTP/1.1 200 ")
        client.writer.close()

    run(scenario)


def test_a_request_that_comes_when_the_router_has_ended_is_refused_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection may be open still: clients are given time to read."""
    monkeypatch.setattr(server, "IDLE_GRACE_S", 3600.0)

    async def scenario(cluster: FakeCluster) -> None:
        clients = [await Client.connect(cluster) for _ in range(2)]
        await until(lambda: len(cluster.connections) == 2)
        cluster.service.stop()
        await (await stopping(cluster))
        finishing = cluster.service._finishing
        assert finishing is not None
        await until(finishing.done)
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
