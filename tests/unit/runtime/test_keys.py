"""Keys on real sockets: only known keys connect, and a name follows from its key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from support.loops import Inbox, run

from kvrelay.errors import ConfigError
from kvrelay.machine.contract import PeerLost, Received
from kvrelay.protocol.codec import encode
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import ProtocolViolation
from kvrelay.protocol.messages.router_to_node import Abort
from kvrelay.runtime.keys import Keys, key_name, make_keys
from kvrelay.runtime.transport import Transport

ANY = "tcp://127.0.0.1:0"


def abort(number: int) -> Abort:
    return Abort(request_id=RequestId("r"), epoch=number)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", ["router", "p0", "d0"])
    return tmp_path / "keys"


@asynccontextmanager
async def transport(peer: str, keys: Keys | None) -> AsyncIterator[tuple[Transport, Inbox]]:
    inbox = Inbox()
    opened = Transport(PeerId(peer), inbox, keys=keys)
    try:
        yield opened, inbox
    finally:
        opened.close()


@asynccontextmanager
async def dealer(address: str, name: str, **options: Any) -> AsyncIterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.ROUTING_ID, name.encode())
        socket.setsockopt(zmq.LINGER, 0)
        for key, value in options.items():
            socket.setsockopt(getattr(zmq, key), value)
        socket.connect(address)
        yield socket


def curve(server: Keys, public: bytes, secret: bytes) -> dict[str, bytes]:
    return {"CURVE_SERVERKEY": server.own_public, "CURVE_PUBLICKEY": public, "CURVE_SECRETKEY": secret}


# ---------------------------------------------------------------- files


def test_secret_keys_are_private_and_made_once(directory: Path) -> None:
    assert (directory / "secret").stat().st_mode & 0o777 == 0o700
    files = sorted((directory / "secret").iterdir())
    assert [path.name for path in files] == ["d0.key", "p0.key", "router.key"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    before = Keys.load(directory, "d0")
    assert make_keys(directory, ["d0", "d1"]) == ["d1"]
    assert Keys.load(directory, "d0").secret == before.secret
    assert before.secret.decode() not in repr(before)


def test_a_host_needs_only_its_own_secret_key(directory: Path) -> None:
    for name in ("router", "p0"):
        (directory / "secret" / f"{name}.key").unlink()
    assert sorted(Keys.load(directory, "d0").public) == ["d0", "p0", "router"]
    with pytest.raises(ConfigError, match=r"cannot read .*secret/p0.key"):
        Keys.load(directory, "p0")


def test_damaged_readable_and_mixed_up_keys_are_refused(directory: Path) -> None:
    secret = directory / "secret" / "d0.key"
    secret.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read"):
        Keys.load(directory, "d0")
    secret.chmod(0o600)
    secret.write_bytes((directory / "secret" / "p0.key").read_bytes())
    with pytest.raises(ConfigError, match="no public key that fits"):
        Keys.load(directory, "d0")
    secret.write_text("no key")
    with pytest.raises(ConfigError, match="does not contain a key"):
        Keys.load(directory, "d0")


@pytest.mark.parametrize(
    ("peer", "name"), [("d0#1", "d0"), ("d0.messager#1", "d0"), ("router", "router"), ("d0.tcp://10.0.0.1:4", "d0")]
)
def test_parts_of_a_node_use_its_key(peer: str, name: str) -> None:
    assert key_name(PeerId(peer)) == name


# ---------------------------------------------------------------- connections


@pytest.mark.parametrize("peer", ["p0#1", "p0.messager#1"])
def test_processes_with_keys_talk(directory: Path, peer: str) -> None:
    async def check() -> None:
        async with (
            transport("d0#1", Keys.load(directory, "d0")) as (server, at_server),
            transport(peer, Keys.load(directory, "p0")) as (client, at_client),
        ):
            [address] = server.bind(ANY)
            client.connect(PeerId("d0#1"), address)
            client.send(PeerId("d0#1"), abort(1), [memoryview(b"payload")])
            event = await at_server.next()
            assert isinstance(event, Received)
            assert (event.peer, event.message, [bytes(part) for part in event.payload]) == (
                peer,
                abort(1),
                [b"payload"],
            )
            server.send(PeerId(peer), abort(2))
            assert await at_client.next() == Received(PeerId("d0#1"), abort(2))

    run(check())


def test_nothing_is_heard_from_who_has_no_key_or_an_unknown_one(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server_keys = Keys.load(directory, "d0")

    async def check() -> None:
        async with (
            transport("d0#1", server_keys) as (server, at_server),
            transport("p0#1", Keys.load(directory, "p0")) as (client, _),
        ):
            [address] = server.bind(ANY)
            async with (
                dealer(address, "p0#1") as without,
                dealer(address, "p0#1", **curve(server_keys, *zmq.curve_keypair())) as unknown,
            ):
                for stranger in (without, unknown):
                    for number in range(10):
                        with suppress(zmq.Again):  # a refused connection is given up at once
                            stranger.send(encode(abort(number)), zmq.DONTWAIT)
                await asyncio.to_thread(_wait_until, lambda: len(_refusals(caplog)) == 2)
                client.connect(PeerId("d0#1"), address)
                client.send(PeerId("d0#1"), abort(77))
                assert await at_server.next() == Received(PeerId("p0#1"), abort(77))
                assert at_server.is_empty

    run(check())
    # Both reconnect all the time, and each is logged once a minute.
    assert len(_refusals(caplog)) == 2


def _refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]


def _wait_until(condition: Any) -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as nothing:
        nothing.bind("inproc://nothing")
        for _ in range(5000):
            if condition():
                return
            nothing.poll(10)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("name", ["p0#1", "router#1", "d0.messager#1", "messager"])
def test_a_known_key_does_not_permit_the_name_of_another(directory: Path, name: str) -> None:
    make_keys(directory, ["x"])
    server_keys, rogue = Keys.load(directory, "d0"), Keys.load(directory, "x")

    async def check() -> None:
        async with (
            transport("d0#1", server_keys) as (server, at_server),
            transport("x#1", rogue) as (honest, _),
        ):
            [address] = server.bind(ANY)
            async with dealer(address, name, **curve(server_keys, rogue.own_public, rogue.secret)) as stranger:
                stranger.send(encode(abort(1)))
                while not await asyncio.to_thread(stranger.poll, 100):
                    continue
                refused = ProtocolViolation(reason=f"the name {name} belongs to another key")
                assert stranger.recv_multipart() == [encode(refused)]
                honest.connect(PeerId("d0#1"), address)
                honest.send(PeerId("d0#1"), abort(2))
                assert await at_server.next() == Received(PeerId("x#1"), abort(2))

    run(check())


def test_a_process_talks_only_to_the_owner_of_the_name(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who listens at d0's address without d0's secret key hears nothing."""
    make_keys(directory, ["x"])

    async def check() -> None:
        async with (
            transport("x#1", Keys.load(directory, "x")) as (rogue, at_rogue),
            transport("p0#1", Keys.load(directory, "p0")) as (client, _),
        ):
            [address] = rogue.bind(ANY)
            client.connect(PeerId("d0#1"), address)
            client.send(PeerId("d0#1"), abort(1))
            await asyncio.to_thread(_wait_until, lambda: any("at tcp" in text for text in _messages(caplog)))
            assert at_rogue.is_empty

    run(check())


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_peer_without_a_public_key_is_lost(directory: Path) -> None:
    async def check() -> None:
        async with transport("p0#1", Keys.load(directory, "p0")) as (client, at_client):
            client.connect(PeerId("d7#1"), "tcp://127.0.0.1:9")
            assert await at_client.next() == PeerLost(PeerId("d7#1"), "security.keys has no public key of d7")

    run(check())
