"""A node's HTTP server for ``/metrics``: what it answers, and that no client takes much of the node's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from support.ports import free_ports

from kvrelay.errors import ConfigError
from kvrelay.node import metrics_server
from kvrelay.node.metrics_server import MAX_CONNECTIONS, MAX_SHARE, TEXT_AGE_S, MetricsServer

PATIENCE_S = 60.0


class Served:
    """A server with a clock of its own, and the number of texts it has made."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_texts = 0
        self.text_s = 0.0
        self.port = free_ports(1)[0]
        self.server = MetricsServer(self._text, lambda: self.now)

    def _text(self) -> bytes:
        self.num_texts += 1
        self.now += self.text_s
        return b"texts %d\n" % self.num_texts

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a new connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """Return status line and body of the answer to ``request``."""
        reader, writer = await self.connect()
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return head.partition(b"\r\n")[0], body


def run(scenario: Callable[[Served], Awaitable[None]]) -> None:
    """Run ``scenario`` with a server."""

    async def served() -> None:
        its = Served()
        async with its.server.listening("nodes.p0.metrics_port", "127.0.0.1", its.port):
            await scenario(its)

    asyncio.run(served())


def get(path: bytes, method: bytes = b"GET") -> bytes:
    """Return a request."""
    return method + b" " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def test_answers() -> None:
    async def scenario(served: Served) -> None:
        assert await served.ask(get(b"/metrics")) == (b"HTTP/1.1 200 OK", b"texts 1\n")
        assert await served.ask(get(b"/metrics?x=1")) == (b"HTTP/1.1 200 OK", b"texts 1\n")
        assert await served.ask(get(b"/metrics", b"HEAD")) == (b"HTTP/1.1 200 OK", b"")
        assert (await served.ask(get(b"/health")))[0] == b"HTTP/1.1 200 OK"
        assert (await served.ask(get(b"/cluster")))[0] == b"HTTP/1.1 404 Not Found"
        assert (await served.ask(get(b"/metrics", b"POST")))[0] == b"HTTP/1.1 405 Method Not Allowed"

    run(scenario)


@pytest.mark.parametrize(
    "request_bytes",
    [b"\r\n\r\n", b"\x16\x03\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics SPDY/9\r\n\r\n", b"x" * 20_000],
    ids=["nothing", "TLS", "no path", "another protocol", "too long"],
)
def test_anything_else_is_a_bad_request(request_bytes: bytes) -> None:
    async def scenario(served: Served) -> None:
        reader, writer = await served.connect()
        writer.write(request_bytes)
        try:
            assert (await asyncio.wait_for(reader.readline(), PATIENCE_S)) == b"HTTP/1.1 400 Bad Request\r\n"
        except ConnectionResetError:  # there was more than it read
            assert len(request_bytes) > 8192
        writer.close()
        assert (await served.ask(get(b"/health")))[0] == b"HTTP/1.1 200 OK"

    run(scenario)


def test_the_text_is_made_once_for_all_who_ask_together() -> None:
    async def scenario(served: Served) -> None:
        for _ in range(5):
            await served.ask(get(b"/metrics"))
        assert served.num_texts == 1
        served.now += TEXT_AGE_S
        assert await served.ask(get(b"/metrics")) == (b"HTTP/1.1 200 OK", b"texts 2\n")

    run(scenario)


def test_texts_that_take_long_are_made_seldom() -> None:
    async def scenario(served: Served) -> None:
        served.text_s = 0.01
        for _ in range(100):
            await served.ask(get(b"/metrics"))
            served.now += 0.1
        assert served.num_texts * served.text_s <= MAX_SHARE * served.now
        assert served.num_texts > 10

    run(scenario)


def test_a_request_in_single_bytes_is_given_up() -> None:
    async def scenario(served: Served) -> None:
        reader, writer = await served.connect()
        answer = asyncio.create_task(reader.read())
        for byte in get(b"/metrics"):
            if answer.done():
                break
            writer.write(bytes([byte]))
            await asyncio.wait({answer}, timeout=0.01)
        assert (await asyncio.wait_for(answer, PATIENCE_S)).startswith(b"HTTP/1.1 400")
        writer.close()

    run(scenario)


def test_clients_that_send_nothing_are_dropped_and_others_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "TIMEOUT_S", 0.2)

    async def scenario(served: Served) -> None:
        silent = [await served.connect() for _ in range(MAX_CONNECTIONS + 2)]
        assert (await served.ask(get(b"/metrics")))[0] == b"HTTP/1.1 200 OK"
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
            writer.close()

    run(scenario)


def test_no_more_connections_are_open_than_allowed() -> None:
    async def scenario(served: Served) -> None:
        clients = [await served.connect() for _ in range(MAX_CONNECTIONS)]
        late = asyncio.create_task(served.ask(get(b"/metrics")))
        done, _ = await asyncio.wait({late}, timeout=0.3)
        assert not done  # it is not accepted as long as the others are open
        clients[0][1].close()
        assert (await asyncio.wait_for(late, PATIENCE_S))[0] == b"HTTP/1.1 200 OK"
        for _, writer in clients:
            writer.close()

    run(scenario)


def test_a_text_that_cannot_be_made_costs_one_answer() -> None:
    async def scenario(served: Served) -> None:
        made, served.server._exposition = served.server._exposition, lambda: 1 // 0 * b""
        assert (await served.ask(get(b"/metrics")))[0] == b"HTTP/1.1 500 Internal Server Error"
        served.server._exposition = made
        assert (await served.ask(get(b"/metrics")))[0] == b"HTTP/1.1 200 OK"

    run(scenario)


def test_a_port_in_use_is_named() -> None:
    async def scenario(served: Served) -> None:
        with pytest.raises(ConfigError, match=r"nodes.d0.metrics_port: cannot listen at 127\.0\.0\.1"):
            async with MetricsServer(bytes, lambda: 0.0).listening("nodes.d0.metrics_port", "127.0.0.1", served.port):
                pass

    run(scenario)
