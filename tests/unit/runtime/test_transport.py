"""Transport on real sockets of the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from socket import EAI_AGAIN, EAI_NONAME, gaierror
from typing import Any

import pytest
import zmq
from support.loops import Inbox, run
from support.ports import free_ports

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import PeerLost, Received
from kvrelay.protocol.codec import encode
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, Load, ProtocolViolation
from kvrelay.protocol.messages.router_to_node import Abort
from kvrelay.runtime.peer_names import PeerNames
from kvrelay.runtime.transport import MAX_PART_BYTES, Transport

ANY = "tcp://127.0.0.1:0"


def abort(number: int) -> Abort:
    return Abort(request_id=RequestId("r"), epoch=number)


@asynccontextmanager
async def transport(name: str, **options: Any) -> AsyncIterator[tuple[Transport, Inbox]]:
    inbox = Inbox()
    opened = Transport(PeerId(name), inbox, **options)
    try:
        yield opened, inbox
    finally:
        opened.close()


@asynccontextmanager
async def pair(**options: Any) -> AsyncIterator[tuple[Transport, Inbox, Transport, Inbox]]:
    """A server ``d0#1`` and a client ``p0#1`` that reached out to it and was heard once."""
    async with transport("d0#1", **options) as (server, at_server), transport("p0#1", **options) as (client, at_client):
        [address] = server.bind(ANY)
        client.connect(PeerId("d0#1"), address)
        client.send(PeerId("d0#1"), Heartbeat())
        assert await at_server.next() == Received(PeerId("p0#1"), Heartbeat())
        yield server, at_server, client, at_client


@asynccontextmanager
async def raw_dealer(address: str, name: bytes) -> AsyncIterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, name)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


async def received(socket: zmq.Socket[bytes]) -> list[bytes]:
    while not await asyncio.to_thread(socket.poll, 100):
        continue
    return socket.recv_multipart()


def test_request_and_reply() -> None:
    async def check() -> None:
        async with pair() as (server, at_server, client, at_client):
            client.send(PeerId("d0#1"), abort(1))
            assert await at_server.next() == Received(PeerId("p0#1"), abort(1))
            server.send(PeerId("p0#1"), abort(2))
            assert await at_client.next() == Received(PeerId("d0#1"), abort(2))

    run(check())


def test_messages_to_one_peer_stay_in_order() -> None:
    async def check() -> None:
        async with pair() as (_, at_server, client, _):
            for number in range(500):
                client.send(PeerId("d0#1"), abort(number))
            for number in range(500):
                assert await at_server.next() == Received(PeerId("p0#1"), abort(number))

    run(check())


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_binds_several_addresses_and_tells_which(scheme: str, tmp_path: Any) -> None:
    async def check() -> None:
        async with transport("d0#1") as (server, at_server), transport("p0#1") as (client, _):
            bound = server.bind(ANY, f"ipc://{tmp_path}/d0")
            address = next(address for address in bound if address.startswith(scheme))
            assert not address.endswith(":0")
            client.connect(PeerId("d0#1"), address)
            client.send(PeerId("d0#1"), abort(1))
            assert await at_server.next() == Received(PeerId("p0#1"), abort(1))

    run(check())


def test_payload_parts_arrive_apart_and_are_read_from_the_senders_memory() -> None:
    async def check() -> None:
        async with pair() as (_, at_server, client, _):
            memory = bytearray(1 << 20)
            memory[:4] = memory[-4:] = b"head"
            view = memoryview(memory)
            client.send(PeerId("d0#1"), abort(1), [view[:4], view[4:], view[:0]])
            event = await at_server.next()
            assert isinstance(event, Received)
            assert [len(part) for part in event.payload] == [4, (1 << 20) - 4, 0]
            assert b"".join(event.payload) == bytes(memory)
            assert all(isinstance(part, memoryview) for part in event.payload)

    run(check())


def test_large_payload_is_not_copied_when_it_is_queued() -> None:
    async def check() -> None:
        async with transport("p0#1") as (client, _):
            client.connect(PeerId("d0#1"), "ipc:///nonexistent/never")
            memory = bytearray(8)
            view = memoryview(memory)
            client.send(PeerId("d0#1"), abort(1), [view])
            with pytest.raises(BufferError):  # ZMQ itself holds on to it
                memory.append(0)

    run(check())


def test_what_is_sent_before_the_peer_is_there_waits_for_it() -> None:
    async def check() -> None:
        (port,) = free_ports(1)
        address = f"tcp://127.0.0.1:{port}"
        async with transport("p0#1") as (client, _), transport("d0#1") as (server, at_server):
            client.connect(PeerId("d0#1"), address)
            client.send(PeerId("d0#1"), abort(1))
            server.bind(address)
            assert await at_server.next() == Received(PeerId("p0#1"), abort(1))

    run(check())


@pytest.mark.parametrize("bound", [False, True])
def test_a_peer_that_was_never_there_is_lost(bound: bool) -> None:
    async def check() -> None:
        async with transport("d0#1") as (server, at_server):
            if bound:
                server.bind(ANY)
            server.send(PeerId("p9#1"), abort(1))
            assert at_server.is_empty  # never from within send: the machine is still at work
            event = await at_server.next()
            assert isinstance(event, PeerLost)
            assert event.peer == "p9#1"

    run(check())


@pytest.mark.fault("F09")
def test_a_peer_that_does_not_read_is_lost_and_nothing_blocks() -> None:
    async def check() -> None:
        async with transport("p0#1", send_queue=5) as (client, at_client):
            client.connect(PeerId("d0#1"), "ipc:///nonexistent/never")
            for number in range(6):
                client.send(PeerId("d0#1"), abort(number))
            event = await at_client.next()
            assert isinstance(event, PeerLost)
            assert event.peer == "d0#1"
            assert "cannot send Abort" in event.reason
            assert at_client.is_empty

    run(check())


def test_what_is_sent_before_a_name_is_known_is_held_and_stays_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: list[str] = []

    async def has_only_ipv6(host: str, port: int) -> bool:
        lookups.append(host)
        if len(lookups) < 3:
            raise gaierror(EAI_AGAIN, "Temporary failure in name resolution")
        return False

    monkeypatch.setattr("kvrelay.runtime.transport.has_only_ipv6", has_only_ipv6)
    monkeypatch.setattr("kvrelay.runtime.transport._LOOKUP_INTERVAL_S", 0)

    async def check() -> None:
        async with transport("d0#1") as (server, at_server), transport("p0#1") as (client, _):
            [address] = server.bind(ANY)
            client.connect(PeerId("d0#1"), address.replace("127.0.0.1", "localhost"))
            for number in range(3):
                client.send(PeerId("d0#1"), abort(number), [memoryview(b"payload")])
            for number in range(3):
                event = await at_server.next()
                assert isinstance(event, Received)
                assert (event.message, [bytes(part) for part in event.payload]) == (abort(number), [b"payload"])
        assert lookups == ["localhost"] * 3

    run(check())


def test_a_peer_whose_name_is_never_known_is_lost_when_too_much_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def has_only_ipv6(host: str, port: int) -> bool:
        raise gaierror(EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("kvrelay.runtime.transport.has_only_ipv6", has_only_ipv6)

    async def check() -> None:
        async with transport("p0#1", send_queue=10) as (client, at_client):
            client.connect(PeerId("d0#1"), "tcp://nowhere.test:1")
            for number in range(11):
                client.send(PeerId("d0#1"), abort(number))
            lost = await at_client.next()
            assert isinstance(lost, PeerLost)
            assert lost.peer == "d0#1"
            client.disconnect(PeerId("d0#1"))
            client.send(PeerId("d0#1"), abort(0))
            assert await at_client.next() == PeerLost(PeerId("d0#1"), "not connected")

    run(check())


def test_disconnect_drops_the_peer_and_what_is_queued_for_it() -> None:
    async def check() -> None:
        async with pair() as (server, at_server, client, at_client):
            client.disconnect(PeerId("d0#1"))
            client.disconnect(PeerId("d0#1"))  # knows nobody of that name any more: no fault
            client.send(PeerId("d0#1"), abort(1))
            assert await at_client.next() == PeerLost(PeerId("d0#1"), "not connected")
            while not isinstance(event := await lost_by(server, at_server), PeerLost):
                continue
            assert event.peer == "p0#1"

    async def lost_by(server: Transport, inbox: Inbox) -> object:
        server.send(PeerId("p0#1"), Heartbeat())
        await asyncio.sleep(0.005)
        return None if inbox.is_empty else await inbox.next()

    run(check())


def test_connecting_twice_or_binding_twice_is_our_fault() -> None:
    async def check() -> None:
        async with transport("d0#1") as (server, _):
            [address] = server.bind(ANY)
            server.connect(PeerId("d1#1"), address)
            with pytest.raises(LocalProtocolError):
                server.connect(PeerId("d1#1"), address)
            with pytest.raises(LocalProtocolError):
                server.bind(ANY)

    run(check())


def test_two_incarnations_are_two_peers() -> None:
    async def check() -> None:
        async with transport("d0#1") as (server, at_server):
            [address] = server.bind(ANY)
            async with transport("p0#old") as (old, _), transport("p0#new") as (new, at_new):
                for number, client in enumerate((old, new)):
                    client.connect(PeerId("d0#1"), address)
                    client.send(PeerId("d0#1"), abort(number))
                    assert await at_server.next() == Received(client.me, abort(number))
                server.send(PeerId("p0#new"), abort(7))
                assert await at_new.next() == Received(PeerId("d0#1"), abort(7))

    run(check())


def test_a_peer_that_connects_again_is_heard_and_answered() -> None:
    async def check() -> None:
        async with pair() as (server, at_server, client, at_client):
            address = server._router.getsockopt_string(zmq.LAST_ENDPOINT)  # type: ignore[union-attr]
            for number in range(3):
                client.disconnect(PeerId("d0#1"))
                client.connect(PeerId("d0#1"), address)
                client.send(PeerId("d0#1"), abort(number))
                assert await at_server.next() == Received(PeerId("p0#1"), abort(number))
                server.send(PeerId("p0#1"), abort(number))
                assert await at_client.next() == Received(PeerId("d0#1"), abort(number))

    run(check())


@pytest.mark.fault("F13")
def test_a_peer_that_reconnects_before_its_old_connection_is_seen_to_end_takes_its_place() -> None:
    async def check() -> None:
        async with transport("d0#1") as (server, at_server):
            [address] = server.bind(ANY)
            async with raw_dealer(address, b"p0#1/secret") as old:
                old.send(encode(abort(1)))
                assert await at_server.next() == Received(PeerId("p0#1"), abort(1))
                async with raw_dealer(address, b"p0#1/secret") as new:
                    new.send(encode(abort(2)))
                    assert await at_server.next() == Received(PeerId("p0#1"), abort(2))
                    server.send(PeerId("p0#1"), abort(3))
                    assert await received(new) == [encode(abort(3))]

    run(check())


@pytest.mark.fault("F28")
@pytest.mark.parametrize("routing_id", [b"p0#1", b"p0#1/", b"p0#1/guessed", b"p0#1/a/b"])
@pytest.mark.parametrize("said", [b"\xc1", encode(abort(9)), encode(ProtocolViolation(reason="no")), b""])
def test_a_stranger_with_the_name_of_a_peer_is_told_and_the_peer_goes_on(routing_id: bytes, said: bytes) -> None:
    """Before, it took the peer's place, and one garbage message made this process deaf to the peer for ever."""

    async def check() -> None:
        async with pair() as (server, at_server, client, at_client):
            address = server._router.getsockopt_string(zmq.LAST_ENDPOINT)  # type: ignore[union-attr]
            async with raw_dealer(address, routing_id) as stranger:
                stranger.send(said)
                refused = ProtocolViolation(reason="the name p0#1 belongs to another connection")
                assert await received(stranger) == [encode(refused)]
                client.send(PeerId("d0#1"), abort(1))
                assert await at_server.next() == Received(PeerId("p0#1"), abort(1))
                server.send(PeerId("p0#1"), abort(2))
                assert await at_client.next() == Received(PeerId("d0#1"), abort(2))
                assert at_server.is_empty

    run(check())


def test_a_peer_that_is_known_by_another_name_or_address_now_is_heard() -> None:
    """A router that finds a restarted node at an address calls it by a new name, and ipc may follow tcp."""

    async def check() -> None:
        async with pair() as (server, at_server, client, at_client):
            address = server._router.getsockopt_string(zmq.LAST_ENDPOINT)  # type: ignore[union-attr]
            client.disconnect(PeerId("d0#1"))
            client.connect(PeerId("d0#2"), address)
            client.send(PeerId("d0#2"), abort(1))
            assert await at_server.next() == Received(PeerId("p0#1"), abort(1))
            server.send(PeerId("p0#1"), abort(2))
            assert await at_client.next() == Received(PeerId("d0#2"), abort(2))

    run(check())


def test_no_two_processes_have_one_routing_id() -> None:
    routing_ids = {PeerNames(PeerId("p0#1")).own_routing_id for _ in range(100)}
    assert len(routing_ids) == 100
    assert all(routing_id.startswith(b"p0#1/") and len(routing_id) <= 255 for routing_id in routing_ids)


def test_of_too_many_peers_the_one_silent_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.runtime.peer_names.MAX_PEERS", 100)
    names = PeerNames(PeerId("d0#1"))
    assert names.peer(b"p0#1/secret") == "p0#1"
    for number in range(1000):
        names.peer(f"x{number}".encode())
        assert names.peer(b"p0#1/secret") == "p0#1"
        assert names.peer(b"p0#1/guessed") is None
    assert len(names) == 100
    assert names.routing_id(PeerId("p0#1")) == b"p0#1/secret"
    assert names.routing_id(PeerId("x0")) is None


@pytest.mark.fault("F28")
@pytest.mark.parametrize(
    "garbage",
    [
        [b"\xc1"],
        [b""],
        [b"GET / HTTP/1.1\r\n\r\n"],
        [b"\xdd\xff\xff\xff\xff"],
        [b"\x81\x90\x00"],
        [encode(abort(1))[:-1]],
        [b"\x93\xa5Abort\x80\x80"],
    ],
)
def test_garbage_is_answered_and_makes_its_sender_lost_but_not_for_ever(garbage: list[bytes]) -> None:
    async def check() -> None:
        async with pair() as (server, at_server, client, at_client):
            address = server._router.getsockopt_string(zmq.LAST_ENDPOINT)  # type: ignore[union-attr]
            async with raw_dealer(address, b"x#1") as stranger:
                stranger.send_multipart(garbage)
                lost = await at_server.next()
                assert isinstance(lost, PeerLost)
                assert lost.peer == "x#1"
                [answer] = await received(stranger)
                assert answer == encode(ProtocolViolation(reason=lost.reason))
                stranger.send_multipart([encode(abort(9))])
                assert await at_server.next() == Received(PeerId("x#1"), abort(9))
                client.send(PeerId("d0#1"), abort(1))
                assert await at_server.next() == Received(PeerId("p0#1"), abort(1))
                server.send(PeerId("p0#1"), abort(2))
                assert await at_client.next() == Received(PeerId("d0#1"), abort(2))
                assert at_server.is_empty

    run(check())


def test_a_name_that_is_not_text_does_no_harm() -> None:
    async def check() -> None:
        async with transport("d0#1") as (server, at_server):
            [address] = server.bind(ANY)
            async with raw_dealer(address, b"\xff\xfe\x00") as stranger:
                stranger.send_multipart([encode(abort(1))])
                event = await at_server.next()
                assert isinstance(event, Received)
                server.send(event.peer, abort(2))
                assert await received(stranger) == [encode(abort(2))]

    run(check())


@pytest.mark.fault("F28")
def test_a_part_beyond_the_limit_is_not_read_at_all() -> None:
    async def check() -> None:
        async with pair() as (server, at_server, client, _):
            address = server._router.getsockopt_string(zmq.LAST_ENDPOINT)  # type: ignore[union-attr]
            async with raw_dealer(address, b"x#1") as stranger:
                stranger.send_multipart([encode(abort(1)), bytes(MAX_PART_BYTES + 1)], copy=False)
                # Only the connection is dropped: the stranger may come again with something sensible.
                stranger.send_multipart([encode(abort(2))])
                assert await at_server.next() == Received(PeerId("x#1"), abort(2))
            client.send(PeerId("d0#1"), abort(3))
            assert await at_server.next() == Received(PeerId("p0#1"), abort(3))

    run(check())


def test_a_violation_from_a_peer_makes_it_lost_and_is_not_answered() -> None:
    async def check() -> None:
        async with pair() as (server, at_server, client, at_client):
            client.send(PeerId("d0#1"), ProtocolViolation(reason="unknown message 'Future'"))
            assert await at_server.next() == PeerLost(PeerId("p0#1"), "unknown message 'Future'")
            client.send(PeerId("d0#1"), abort(1))
            assert await at_server.next() == Received(PeerId("p0#1"), abort(1))
            server.send(PeerId("p0#1"), abort(2))
            assert await at_client.next() == Received(PeerId("d0#1"), abort(2))  # and no violation before it

    run(check())


def test_refusals_are_logged_once_per_peer_and_minute(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with transport("d0#1") as (server, at_server):
            [address] = server.bind(ANY)
            async with raw_dealer(address, b"x#1") as stranger, raw_dealer(address, b"y#1") as other:
                for dealer in (stranger, other):
                    for _ in range(10):
                        dealer.send(b"\xc1")
                        assert isinstance(await at_server.next(), PeerLost)

    run(check())
    assert [record.args[0] for record in caplog.records if record.args] == ["x#1", "y#1"]  # type: ignore[index]


def test_many_messages_at_once_do_not_starve_the_loop() -> None:
    """However much there is to read, other callbacks of the loop get their turn in between."""

    async def check() -> None:
        async with pair() as (_server, at_server, client, _):
            turns = 0

            def turn() -> None:
                nonlocal turns
                turns += 1
                asyncio.get_running_loop().call_soon(turn)

            for number in range(900):
                client.send(PeerId("d0#1"), Heartbeat(load=Load(num_waiting=number)))
            turn()
            for _ in range(900):
                await at_server.next()
            assert turns >= 900 // 64

    run(check())


def test_sending_and_receiving_at_once_loses_no_wake_up() -> None:
    """ZMQ's descriptor is edge-triggered: a send may swallow the edge that told of something to read."""

    async def check() -> None:
        async with pair() as (server, at_server, client, at_client):
            for number in range(300):
                client.send(PeerId("d0#1"), abort(number))
                server.send(PeerId("p0#1"), abort(number))
                client.send(PeerId("d0#1"), abort(number))
                assert await at_client.next() == Received(PeerId("d0#1"), abort(number))
                assert await at_server.next() == Received(PeerId("p0#1"), abort(number))
                assert await at_server.next() == Received(PeerId("p0#1"), abort(number))

    run(check())


@pytest.mark.fault("F28")
@pytest.mark.parametrize("taken", [b"router", b"messager"])
def test_nobody_who_reaches_out_can_pass_for_a_connection_of_our_own(taken: bytes, tmp_path: Path) -> None:
    async def main() -> None:
        async with transport("router") as (router, _), transport("d0#1") as (node, at_node):
            [control] = router.bind(ANY)
            [address] = node.bind(ANY)
            node.connect(PeerId("router"), control)
            node.bind_private(PeerId("messager"), f"ipc://{tmp_path}/d0")
            async with raw_dealer(address, taken) as stranger, raw_dealer(address, b"p0#1") as honest:
                for number in range(100):
                    stranger.send(encode(abort(number)))
                for number in range(100):
                    honest.send(encode(abort(number)))
                heard = [await at_node.next() for _ in range(100)]
            assert heard == [Received(PeerId("p0#1"), abort(number)) for number in range(100)]

    run(main())


def test_a_private_channel_joins_two_processes_and_no_third(tmp_path: Path) -> None:
    async def check() -> None:
        async with transport("d0#1") as (node, at_node), transport("d0.messager#1") as (messager, at_messager):
            node.bind_private(PeerId("messager"), f"ipc://{tmp_path}/d0")
            messager.connect_private(PeerId("d0#1"), f"ipc://{tmp_path}/d0")
            messager.send(PeerId("d0#1"), abort(1), [memoryview(b"payload")])
            event = await at_node.next()
            assert isinstance(event, Received)
            assert (event.peer, event.message) == ("messager", abort(1))
            async with raw_dealer(f"ipc://{tmp_path}/d0", b"messager") as second:
                second.send(b"\xc1")
                for number in range(10):
                    node.send(PeerId("messager"), abort(number))
                    assert await at_messager.next() == Received(PeerId("d0#1"), abort(number))
            assert at_node.is_empty

    run(check())
