"""A cluster with keys: it serves as without, and whoever has no key, or that of another, does not disturb it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from support.asking import Asker, answers, answers_while, assert_right, play, random_asks
from support.cluster import PATIENCE_S, Cluster, running, until
from support.cluster_config import cluster_config, d, fake_engine, p

from kvrelay.protocol.codec import encode
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.protocol.messages.node_to_router import Drained, Leaving
from kvrelay.runtime.keys import Keys, make_keys

NUM_CONNECTIONS = 300
GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01CURVE".ljust(65, b"\0")
HUGE = GREETING + b"\x06" + struct.pack(">Q", 2 << 30)
"""Announces a frame of 2 GB."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    make_keys(directory, ["router", "p0", "d0", "d1"])
    return directory


@pytest.fixture(scope="module")
def keyed_cluster(model: Path, keys: Path) -> Iterator[Cluster]:
    """1P2D whose messagers use tcp, so that everything goes through CURVE."""
    config = cluster_config(
        model,
        p(),
        d("d0"),
        d("d1"),
        cache={"num_blocks": 1024},
        engine=fake_engine(step_s=0.002),
        transfer={"link": "tcp"},
        security={"keys": str(keys)},
    )
    with running(config) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def same_processes(keyed_cluster: Cluster) -> Iterator[None]:
    """Fail a test that costs a process its life, or lets one grow or keep descriptors."""
    before = keyed_cluster.memory()
    yield
    keyed_cluster.wait_until_quiescent()
    after = keyed_cluster.memory()
    assert after.keys() == before.keys()
    assert all(after[pid] - before[pid] < 64 << 20 for pid in before)


def ports(cluster: Cluster) -> list[int]:
    """Return every ZMQ port of the cluster: the router's, one of each node and one of each messager."""
    found = cluster.listening() - {cluster.config.router.port, cluster.config.router.admin_address[1]}
    assert len(found) == 1 + 3 + 3
    return sorted(found)


def test_a_cluster_with_keys_gives_the_right_answers(keyed_cluster: Cluster) -> None:
    asks = random_asks(60, 60)
    assert assert_right(keyed_cluster, asks, answers(keyed_cluster, asks)) == len(asks)


def _say(cluster: Cluster, own: Keys | None, server: Keys, name: str) -> None:
    """Send messages to every port as ``name`` with the key pair ``own``; a server other than ``server`` refuses it."""
    with zmq.Context() as context:
        for port in ports(cluster):
            with context.socket(zmq.DEALER) as dealer:
                dealer.setsockopt(zmq.ROUTING_ID, name.encode())
                dealer.setsockopt(zmq.LINGER, 200)
                if own is not None:
                    dealer.setsockopt(zmq.CURVE_SERVERKEY, server.own_public)
                    dealer.setsockopt(zmq.CURVE_PUBLICKEY, own.own_public)
                    dealer.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
                dealer.connect(f"tcp://127.0.0.1:{port}")
                dealer.setsockopt(zmq.SNDTIMEO, 0)
                for message in (b"\xc1", encode(Leaving()), encode(Drained()), encode(Heartbeat())):
                    with contextlib.suppress(zmq.Again):  # the connection was refused already
                        dealer.send(message)


@pytest.mark.fault("F28")
def test_no_key_a_wrong_key_and_the_name_of_another(keyed_cluster: Cluster, keys: Path, tmp_path: Path) -> None:
    make_keys(tmp_path, ["router", "d1"])
    nodes = sorted(set(re.findall(r"node registered.*node=(\w+#[0-9a-f]+)", keyed_cluster.log())))
    servers = [Keys.load(keys, name) for name in ("router", "p0", "d0")]
    unknown, d1 = Keys.load(tmp_path, "d1"), Keys.load(keys, "d1")

    def disturb() -> None:
        for name in nodes:
            for server in servers:
                _say(keyed_cluster, None, server, name)
                _say(keyed_cluster, unknown, server, name)
                if not name.startswith("d1"):
                    _say(keyed_cluster, d1, server, name)

    _assert_undisturbed(keyed_cluster, disturb)
    for reason in ("unknown key", "belongs to another key"):
        until(f"it is logged: {reason}", lambda reason=reason: reason in keyed_cluster.log())  # type: ignore[misc]
    lines = [line for line in keyed_cluster.log().splitlines() if "refused" in line or "another key" in line]
    # Once per minute, process and kind: strangers do not fill the log.
    assert len(lines) < 100


@pytest.mark.fault("F28")
def test_floods_huge_prefixes_and_slow_handshakes(keyed_cluster: Cluster) -> None:
    """Many connections that say nothing, one byte at a time, or announce 2 GB."""

    def disturb() -> None:
        for port in ports(keyed_cluster):
            open_ones = [socket.create_connection(("127.0.0.1", port)) for _ in range(NUM_CONNECTIONS)]
            for number, plain in enumerate(open_ones):
                content = (b"", HUGE + b"x" * 1000, GREETING)[number % 3]
                for byte in content[:80]:
                    if not _sent(plain, bytes([byte])):
                        break
            for plain in open_ones:
                plain.close()

    _assert_undisturbed(keyed_cluster, disturb)


@pytest.mark.fault("F28")
def test_strangers_of_every_kind_at_once_while_eight_streams_run(
    keyed_cluster: Cluster, keys: Path, tmp_path: Path
) -> None:
    make_keys(tmp_path, ["router", "d1"])
    router, d0 = keyed_cluster.config.router, keyed_cluster.config.node("d0")
    unknown, d1 = Keys.load(tmp_path, "d1"), Keys.load(keys, "d1")
    name = re.findall(r"node registered.*node=(p0#[0-9a-f]+)", keyed_cluster.log())[-1]
    recorded = _record(d0.host, d0.port, Keys.load(keys, "d0"), d1)

    def forge() -> None:
        for own in (None, unknown, d1):
            _say(keyed_cluster, own, Keys.load(keys, "router"), name)

    def replay() -> None:
        for _ in range(50):
            with socket.create_connection((d0.host, d0.port)) as plain:
                _sent(plain, recorded)

    def flood() -> None:
        everywhere = [*ports(keyed_cluster), router.port]
        with contextlib.ExitStack() as stack:
            for number in range(500):
                port = everywhere[number % len(everywhere)]
                plain = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                _sent(plain, HUGE if port != router.port else b"\x16\x03\x01 hello\r\n\r\n")

    def trickle() -> None:
        request = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{" + b" " * 50
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(("127.0.0.1", router.port))) for _ in range(50)]
            for byte in request:
                for plain in slow:
                    _sent(plain, bytes([byte]))

    asks = random_asks(62, 8, max_tokens=64)

    async def scenario(asker: Asker) -> int:
        attacks = asyncio.gather(*(asyncio.to_thread(attack) for attack in (forge, replay, flood, trickle)))
        num_streams = 0
        while num_streams == 0 or not attacks.done():
            streams = await asyncio.gather(*map(asker.stream_tokens, asks))
            assert streams == [ask.expected(keyed_cluster.fake()) for ask in asks]
            num_streams += len(streams)
        await attacks
        return num_streams

    assert play(keyed_cluster, scenario) >= len(asks)
    keyed_cluster.wait_until_quiescent()
    _assert_logged_once_a_minute(keyed_cluster)


def _assert_logged_once_a_minute(cluster: Cluster) -> None:
    """Check that no process has said the same of the same stranger more often than once for each minute of its life."""
    minutes = (time.time() - psutil.Process(cluster.process.pid).create_time()) / 60
    said = re.compile(r"(refused|belongs to another|keys do not fit|invalid HTTP|not MessagePack)")
    lines = [
        re.sub(r"\d\d:\d\d:\d\d\S*|\d{4}-\S+", "", line) for line in cluster.log().splitlines() if said.search(line)
    ]
    assert lines
    [(line, count)] = Counter(lines).most_common(1)
    assert count <= 2 * (minutes + 1), line  # a node and its messager are two processes, whose lines begin alike


def _sent(plain: socket.socket, content: bytes) -> bool:
    try:
        plain.sendall(content)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


@pytest.mark.fault("F28")
def test_recorded_bytes_of_a_real_connection_are_worth_nothing(keyed_cluster: Cluster, keys: Path) -> None:
    """Replays what a process with a key sent: the server's part of each handshake is new."""
    d0, d1 = Keys.load(keys, "d0"), Keys.load(keys, "d1")
    target = keyed_cluster.config.node("d0")
    recorded = _record(target.host, target.port, d0, d1)
    assert len(recorded) > 200

    def disturb() -> None:
        for _ in range(50):
            with socket.create_connection((target.host, target.port)) as plain:
                _sent(plain, recorded)
                plain.settimeout(0.2)
                try:
                    while plain.recv(4096):
                        continue
                except (TimeoutError, ConnectionResetError):
                    continue

    keyed_cluster.wait_until_quiescent()  # by a report made after what was recorded arrived
    before = keyed_cluster.node("d0")["load"]["counters"]["unexpected_messages"]
    _assert_undisturbed(keyed_cluster, disturb)
    assert keyed_cluster.node("d0")["load"]["counters"]["unexpected_messages"] == before


def _record(host: str, port: int, server: Keys, own: Keys) -> bytes:
    """Return the bytes that a real client sends to ``host:port``, through a relay in between."""
    recorded = bytearray()
    with (
        socket.create_server(("127.0.0.1", 0)) as relay,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as dealer,
        socket.create_connection((host, port)) as onward,
    ):
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.ROUTING_ID, b"d1#recorded")
        dealer.setsockopt(zmq.CURVE_SERVERKEY, server.own_public)
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, own.own_public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
        dealer.connect(f"tcp://127.0.0.1:{relay.getsockname()[1]}")
        dealer.send(encode(Heartbeat()))
        accepted, _ = relay.accept()
        with accepted:
            accepted.settimeout(0.05)
            onward.settimeout(0.05)
            for _ in range(40):
                recorded += _pass(accepted, onward)
                _pass(onward, accepted)
    return bytes(recorded)


def _pass(source: socket.socket, target: socket.socket) -> bytes:
    try:
        content = source.recv(4096)
    except TimeoutError:
        return b""
    target.sendall(content)
    return content


def test_a_node_without_the_key_of_its_name_does_not_start(keyed_cluster: Cluster, tmp_path: Path, model: Path) -> None:
    make_keys(tmp_path, ["router", "p0"])
    config = cluster_config(model, p(), d("d0"), engine=fake_engine(), security={"keys": str(tmp_path)})
    stranger = Cluster(config)
    try:
        assert stranger.kvrelay("decode", "--node", "d0").wait(PATIENCE_S) == 2
        assert "security.keys: cannot read" in stranger.log()
    finally:
        stranger.close()


def _assert_undisturbed(cluster: Cluster, disturb: object) -> None:
    asks = random_asks(61, 60)
    given = answers_while(cluster, asks, disturb, limit=4, first=2)  # type: ignore[arg-type]
    assert assert_right(cluster, asks, given) == len(asks)
    cluster.wait_until_quiescent()
    assert assert_right(cluster, asks[:10], answers(cluster, asks[:10])) == 10
