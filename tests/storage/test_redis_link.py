"""Calls to Redis that are cancelled, and connections that are closed, at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.loops import run
from support.redis_server import RedisServer, binary, redis_server

from kvrelay.errors import StorageUnavailableError
from kvstore.storage.redis_link import RedisLink

pytestmark = pytest.mark.skipif(binary() is None, reason="no redis-server here")

_PATIENCE_S = 120.0
_MOST_TURNS = 60
"""Turns of the loop until a call has been answered, and more."""

Call = Callable[[RedisLink], Coroutine[Any, Any, object]]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@asynccontextmanager
async def opened(server: RedisServer) -> AsyncIterator[RedisLink]:
    link = RedisLink(server.url, _PATIENCE_S)
    await link.open()
    try:
        yield link
    finally:
        await link.close()


async def ask(link: RedisLink) -> object:
    return await link.run([("EXISTS", "key")])


async def keys(link: RedisLink) -> object:
    return await link.keys("*")


async def max_memory(link: RedisLink) -> object:
    return await link.max_memory_bytes()


@pytest.mark.parametrize("call", [ask, keys, max_memory])
@pytest.mark.parametrize("is_connected", [False, True])
def test_a_call_that_is_cancelled_ends_so_at_any_moment(call: Call, is_connected: bool, server: RedisServer) -> None:
    """Python 3.11's wait_for, in redis-py, may swallow it: then a call would go on after its deadline."""

    async def check() -> None:
        for num_turns in range(_MOST_TURNS):
            async with opened(server) as link:
                if is_connected:
                    await call(link)
                task = asyncio.create_task(call(link))
                for _ in range(num_turns):
                    await asyncio.sleep(0)
                if task.cancel():
                    with pytest.raises(asyncio.CancelledError):
                        await task

    run(check())


@pytest.mark.parametrize("call", [ask, keys, max_memory])
def test_a_connection_that_was_closed_is_a_server_that_did_not_answer(
    call: Call, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop says so with a RuntimeError."""
    open_connection, writers = asyncio.open_connection, list[asyncio.StreamWriter]()

    async def noted(*arguments: Any, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await open_connection(*arguments, **options)
        writers.append(writer)
        return reader, writer

    monkeypatch.setattr(asyncio, "open_connection", noted)

    async def check() -> None:
        async with opened(server) as link:
            await call(link)
            for writer in writers:
                writer.transport.abort()
            with pytest.raises(StorageUnavailableError):
                await call(link)
            await call(link)

    run(check())
