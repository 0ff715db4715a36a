"""A worker that its router stops: it finishes what its clients have, and the second time it does not wait for them."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest
import uvloop
from fake_nodes import config, until, until_refused

from router.workers import __main__ as worker
from router.workers.channel import Channel
from router.workers.messages import FromWorker, Ready, Serve, Start, Stop
from router.workers.pool import worker_config

REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_worker_waits_for_its_clients_until_it_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "tune_gc", lambda: None)
    monkeypatch.setattr(worker, "_end_with_router", lambda _: asyncio.Event().wait())  # not of this process
    received: list[FromWorker] = []

    async def check() -> None:
        here, there = socket.socketpair()
        router = Channel(FromWorker, received.append)
        await router.open(here)
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        address = listener.getsockname()
        start = Start(0, msgspec.Raw(b"{}"), 0.0, 512)
        ended = asyncio.create_task(worker.serve(start, worker_config(config("mixed", workers=2)), there, listener))
        await until(lambda: Ready() in received)
        router.send(Serve())
        reader, writer = await asyncio.open_connection(*address)
        writer.write(REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(REQUEST[:-2])  # and never the rest
        router.send(Stop())
        await until(lambda: listener.fileno() < 0)
        await until_refused(*address)
        assert not ended.done()
        router.send(Stop())
        await reader.read()
        await ended
        writer.close()

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await check()

    uvloop.run(bounded())
