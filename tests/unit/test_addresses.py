from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.ipv6 import NAME, needs_ipv6, with_name
from support.loops import PATIENCE_S, Inbox, run
from support.ports import free_ports

from kvrelay.addresses import has_only_ipv6, is_ipv6, listen_at, netloc, resolve, split_tcp_address, tcp_address
from kvrelay.machine.contract import Received
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.runtime.transport import Transport


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("127.0.0.1", 80, "tcp://127.0.0.1:80"),
        ("node-1.example", 8200, "tcp://node-1.example:8200"),
        ("::1", 8100, "tcp://[::1]:8100"),
        ("::", 0, "tcp://[::]:0"),
        ("fe80::1%eth0", 65535, "tcp://[fe80::1%eth0]:65535"),
        ("::ffff:10.0.0.1", 1, "tcp://[::ffff:10.0.0.1]:1"),
    ],
)
def test_addresses_there_and_back(host: str, port: int, address: str) -> None:
    assert tcp_address(host, port) == address
    assert split_tcp_address(address) == (host, port)
    assert is_ipv6(address) is (":" in host)
    assert f"http://{netloc(host, port)}" == address.replace("tcp", "http")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:80",
        "tcp://127.0.0.1",
        "tcp://::1:80",
        "tcp://[::1]",
        "tcp://[::1]:65536",
        "tcp://[1::2::3]:80",
        "tcp://[127.0.0.1]:80",
        "tcp://[node]:80",
        "tcp://[::1:80",
        "tcp://a b:80",
        "tcp://fe80%eth0:80",
        "ipc:///tmp/a",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="should be"):
        split_tcp_address(address)


@needs_ipv6
@pytest.mark.parametrize(("host", "reached_at"), [("::1", ["::1"]), ("::", ["::1", "127.0.0.1"])])
def test_listening_at_ipv6(host: str, reached_at: list[str]) -> None:
    with listen_at(host, 0, 8) as listening:
        for reached in reached_at:
            socket.create_connection((reached, listening.getsockname()[1]), timeout=PATIENCE_S).close()
            listening.accept()[0].close()


def test_a_name_of_both_families_stands_for_its_ipv4_address(monkeypatch: pytest.MonkeyPatch) -> None:
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 80, 0, 0))
    four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))
    found = [six, four]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert resolve("localhost", 80) == (socket.AF_INET, ("127.0.0.1", 80))
    found.remove(four)
    assert resolve("localhost", 80) == (socket.AF_INET6, ("::1", 80, 0, 0))


@needs_ipv6
def test_listening_at_a_name_that_has_only_an_ipv6_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, **_: object) -> list[object]:
        assert host == "six.test"
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def check() -> None:
        server = Transport(PeerId("d0#1"), Inbox())
        try:
            [address] = server.bind("tcp://six.test:0")
            assert address.startswith("tcp://[::1]:")
            assert await has_only_ipv6("six.test", 1)
        finally:
            server.close()

    run(check())


def test_a_loop_ends_while_a_resolver_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def getaddrinfo(host: str, port: int, **_: object) -> list[object]:
        asked.set()
        answer.wait()
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))]

    async def check() -> None:
        lookup = asyncio.create_task(has_only_ipv6("six.test", 1))
        await asyncio.to_thread(asked.wait)
        lookup.cancel()

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    guard = threading.Timer(PATIENCE_S / 2, answer.set)
    guard.start()
    run(check())
    assert not answer.is_set(), "the loop waited for the resolver"
    guard.cancel()
    answer.set()


@pytest.mark.parametrize("name", ["a..b", "a" * 64 + ".test"])
def test_a_name_that_cannot_be_encoded_has_no_address(name: str) -> None:
    with pytest.raises(OSError, match="is no host name"):
        resolve(name, 1)


PAIR = """
import asyncio, sys
from kvrelay.machine.contract import Received
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.runtime.transport import Transport

async def main():
    heard = asyncio.Queue()
    server, client = Transport("d0#1", heard.put_nowait), Transport("p0#1", heard.put_nowait)
    [address] = server.bind(f"tcp://{sys.argv[1]}:0")
    client.connect("d0#1", f"tcp://{sys.argv[1]}:{address.rpartition(':')[2]}")
    client.send("d0#1", Heartbeat())
    event = await asyncio.wait_for(heard.get(), 60)
    assert isinstance(event, Received) and (event.peer, event.message) == ("p0#1", Heartbeat())
    client.close()
    server.close()
    print(address)

asyncio.run(main())
"""


@needs_ipv6
def test_reaching_out_to_a_name_that_has_only_an_ipv6_address(tmp_path: Path) -> None:
    command = [*with_name(tmp_path), sys.executable, "-c", PAIR, NAME]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("tcp://[::1]:"), done.stderr


@needs_ipv6
def test_messages_over_ipv6_and_ipv4_at_once() -> None:
    async def check() -> None:
        at_server, at_clients = Inbox(), [Inbox(), Inbox()]
        server = Transport(PeerId("d0#1"), at_server)
        clients = [Transport(PeerId(f"p{index}#1"), inbox) for index, inbox in enumerate(at_clients)]
        try:
            addresses = server.bind("tcp://[::1]:0", "tcp://127.0.0.1:0")
            assert [is_ipv6(address) for address in addresses] == [True, False]
            for client, address in zip(clients, addresses, strict=True):
                client.connect(PeerId("d0#1"), address)
                client.send(PeerId("d0#1"), Heartbeat())
            heard = [await at_server.next() for _ in clients]
            assert {event.peer for event in heard if isinstance(event, Received)} == {"p0#1", "p1#1"}
            server.send(PeerId("p0#1"), Heartbeat())
            assert await at_clients[0].next() == Received(PeerId("d0#1"), Heartbeat())
        finally:
            for transport in (server, *clients):
                transport.close()

    run(check())


@needs_ipv6
def test_a_client_that_reaches_out_before_anybody_listens_at_ipv6_is_heard() -> None:
    async def check() -> None:
        address = tcp_address("::1", free_ports(1)[0])
        at_server = Inbox()
        client, server = Transport(PeerId("p0#1"), Inbox()), Transport(PeerId("d0#1"), at_server)
        try:
            client.connect(PeerId("d0#1"), address)
            client.send(PeerId("d0#1"), Heartbeat())
            await asyncio.sleep(0)
            server.bind(address)
            assert await at_server.next() == Received(PeerId("p0#1"), Heartbeat())
        finally:
            client.close()
            server.close()

    run(check())
