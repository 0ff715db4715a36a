"""Answers as bytes: what a client reads, whatever an application sends."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop
from fake_nodes import until
from starlette.types import Message, Receive, Scope, Send

from router.http.server import http_server


def answer_to(method: str, *parts: Message) -> bytes:
    """Return all bytes of the answer to a request, which an application sends in ``parts``."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        for part in parts:
            await send(part)

    async def ask() -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = http_server(app, "127.0.0.1", 0)
            serving = asyncio.create_task(server.serve([listener]))
            await until(lambda: server.started)
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(f"{method} / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            server.should_exit = True
            await serving
        return answer

    return uvloop.run(ask())


def start(status: int, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(content: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def test_a_body_without_a_length_is_sent_in_chunks() -> None:
    head, _, rest = answer_to("GET", start(200), body(b"one", more=True), body(b"", more=True), body(b"two")).partition(
        b"\r\n\r\n"
    )
    assert b"transfer-encoding: chunked" in head
    assert rest == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


@pytest.mark.parametrize("status", [204, 304])
def test_a_status_without_a_body_has_neither_body_nor_chunks(status: int) -> None:
    head, _, rest = answer_to("GET", start(status), body(b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert b"transfer-encoding" not in head
    assert rest == b""


def test_an_answer_to_head_has_the_length_and_no_body() -> None:
    head, _, rest = answer_to("HEAD", start(200, (b"content-length", b"3")), body(b"one")).partition(b"\r\n\r\n")
    assert b"content-length: 3" in head
    assert rest == b""


@pytest.mark.parametrize(
    "parts",
    [
        [start(200, (b"content-length", b"3")), body(b"four")],
        [start(200, (b"content-length", b"3")), body(b"on")],
        [start(200, (b"content-length", b"2"), (b"x", b"a\r\nset-cookie: b")), body(b"ok")],
    ],
    ids=["longer", "shorter", "two headers in one"],
)
def test_an_answer_that_is_not_valid_is_not_sent(parts: list[Message], caplog: pytest.LogCaptureFixture) -> None:
    answer = answer_to("GET", *parts)
    assert b"200" not in answer and b"set-cookie" not in answer
    assert "RuntimeError" in caplog.text
