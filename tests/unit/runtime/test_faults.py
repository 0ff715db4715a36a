"""Faults injected on purpose, on real sockets of the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from support.loops import Inbox, run

from kvrelay.config.faults import FaultsConfig
from kvrelay.machine.contract import Received
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.protocol.messages.router_to_node import Abort
from kvrelay.runtime.faults import FaultyTransport, corrupted, open_transport
from kvrelay.runtime.message_faults import MessageFaults
from kvrelay.runtime.transport import Transport

D0, P0 = PeerId("d0#1"), PeerId("p0#1")
NUM_MESSAGES = 40


def abort(number: int) -> Abort:
    return Abort(request_id=RequestId("r"), epoch=number)


@asynccontextmanager
async def connected(*, delay_s: float = 0.05, seed: int = 0, **rates: float) -> AsyncIterator[tuple[Transport, Inbox]]:
    """Yield a transport whose Aborts to D0 suffer faults, and what D0 gets. Heartbeats are spared."""
    config = FaultsConfig.model_validate({"messages": {"Abort": rates}, "max_delay_s": delay_s, "seed": seed})
    inbox = Inbox()
    server, client = Transport(D0, inbox), open_transport(P0, Inbox(), MessageFaults.of(config))
    try:
        (address,) = server.bind("tcp://127.0.0.1:0")
        client.connect(D0, address)
        yield client, inbox
    finally:
        client.close()
        server.close()


async def arrived(client: Transport, inbox: Inbox, num_messages: int = NUM_MESSAGES) -> list[int]:
    """Send that many Aborts, then a Heartbeat; return the numbers of the Aborts that come before it."""
    for number in range(num_messages):
        client.send(D0, abort(number))
    client.send(D0, Heartbeat())
    numbers = []
    while isinstance(event := await inbox.next(), Received) and isinstance(event.message, Abort):
        numbers.append(event.message.epoch)
    return numbers


def sent_with(**options: Any) -> list[int]:
    async def scenario() -> list[int]:
        async with connected(**options) as (client, inbox):
            return await arrived(client, inbox)

    return run(scenario())


def test_without_faults_for_messages_the_transport_is_the_usual_one() -> None:
    async def scenario() -> None:
        transport = open_transport(P0, Inbox(), MessageFaults.of(FaultsConfig(store_delay_rate=0.5)))
        assert type(transport) is Transport
        transport.close()

    run(scenario())


def test_some_messages_are_lost_and_the_same_ones_with_the_same_seed() -> None:
    numbers = sent_with(drop=0.5)
    assert 5 < len(numbers) < NUM_MESSAGES - 5
    assert numbers == sorted(numbers)
    assert sent_with(drop=0.5) == numbers
    assert sent_with(drop=0.5, seed=1) != numbers


def test_some_messages_come_twice() -> None:
    numbers = sent_with(duplicate=0.5)
    assert sorted(set(numbers)) == list(range(NUM_MESSAGES))
    assert NUM_MESSAGES + 5 < len(numbers) < 2 * NUM_MESSAGES


def test_a_delayed_message_delays_all_that_follow_it() -> None:
    assert sent_with(delay=0.3) == list(range(NUM_MESSAGES))


class HurryingLoop:
    """A loop whose time goes on whenever somebody looks, while its timers wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ahead_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def time(self) -> float:
        self._ahead_s += 0.01
        return self._loop.time() + self._ahead_s

    def call_at(self, at_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(at_s - self.time(), callback)


def test_a_delayed_message_is_not_overtaken_when_the_loop_is_late() -> None:
    async def scenario() -> list[int]:
        async with connected(delay=0.3) as (client, inbox):
            client._loop = HurryingLoop(client._loop)  # type: ignore[assignment]
            return await arrived(client, inbox)

    assert run(scenario()) == list(range(NUM_MESSAGES))


def test_an_overtaken_message_comes_after_those_that_follow_it() -> None:
    async def scenario() -> None:
        async with connected(overtake=1.0) as (client, inbox):
            client.send(D0, abort(1))
            client.send(D0, Heartbeat())
            assert await inbox.next() == Received(P0, Heartbeat())
            assert await inbox.next() == Received(P0, abort(1))

    run(scenario())


def test_a_delayed_payload_is_what_it_was_when_it_was_sent() -> None:
    async def scenario() -> None:
        async with connected(overtake=1.0) as (client, inbox):
            block = bytearray(b"computed")
            client.send(D0, abort(1), [memoryview(block)])
            block[:] = b"reused.."
            event = await inbox.next()
            assert isinstance(event, Received)
            assert [bytes(part) for part in event.payload] == [b"computed"]

    run(scenario())


def test_one_bit_of_a_payload_is_changed() -> None:
    async def scenario() -> None:
        async with connected(corrupt=1.0) as (client, inbox):
            client.send(D0, abort(1), [memoryview(b"header"), memoryview(b"\0\0\0\0")])
            event = await inbox.next()
            assert isinstance(event, Received)
            assert [bytes(part) for part in event.payload] == [b"header", b"\0\0\x10\0"]

    run(scenario())
    assert corrupted([]) == ()


def test_private_connections_are_spared(tmp_path: Path) -> None:
    async def scenario(address: str) -> None:
        faults = MessageFaults({"*": {"drop": 1.0}}, 0.05, 0)
        inbox = Inbox()
        node, messager = FaultyTransport(P0, inbox, faults), FaultyTransport(D0, Inbox(), faults)
        try:
            node.bind_private(D0, address)
            messager.connect_private(P0, address)
            messager.send(P0, abort(7))
            assert await inbox.next() == Received(D0, abort(7))
        finally:
            messager.close()
            node.close()

    run(scenario(f"ipc://{tmp_path}/node"))


def test_what_is_delayed_when_the_transport_closes_is_lost() -> None:
    async def scenario() -> None:
        async with connected(overtake=1.0, delay_s=60.0) as (client, _):
            client.send(D0, abort(1))

    run(scenario())
