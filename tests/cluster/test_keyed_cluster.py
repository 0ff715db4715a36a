"""A cluster with keys: it serves as without, and whoever has no key, or that of another, does not disturb it."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from support.asking import answers, answers_while, assert_right, random_asks
from support.cluster import PATIENCE_S, Cluster, running
from support.cluster_config import cluster_config, d, fake_engine, p

from kvrelay.protocol.codec import encode
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.protocol.messages.node_to_router import Drained, Leaving
from kvrelay.runtime.keys import Keys, make_keys

NUM_CONNECTIONS = 300


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
    before = {pid: psutil.Process(pid).memory_info().rss for pid in keyed_cluster.pids()}
    yield
    keyed_cluster.wait_until_quiescent()
    after = {pid: psutil.Process(pid).memory_info().rss for pid in keyed_cluster.pids()}
    assert after.keys() == before.keys()
    assert all(after[pid] - before[pid] < 64 << 20 for pid in before)


def ports(cluster: Cluster) -> list[int]:
    """Return every ZMQ port of the cluster: the router's, one of each node and one of each messager."""
    found = {
        connection.laddr.port
        for pid in cluster.pids()
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    found -= {cluster.config.router.port, cluster.config.router.admin_address[1]}
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
    lines = [line for line in keyed_cluster.log().splitlines() if "refused" in line or "another key" in line]
    assert any("unknown key" in line for line in lines)
    assert any("belongs to another key" in line for line in lines)
    # Once per minute, process and kind: strangers do not fill the log.
    assert len(lines) < 100


@pytest.mark.fault("F28")
def test_floods_huge_prefixes_and_slow_handshakes(keyed_cluster: Cluster) -> None:
    """Many connections that say nothing, one byte at a time, or announce 2 GB."""
    greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01CURVE".ljust(65, b"\0")
    huge = greeting + b"\x06" + struct.pack(">Q", 2 << 30)

    def disturb() -> None:
        for port in ports(keyed_cluster):
            open_ones = [socket.create_connection(("127.0.0.1", port)) for _ in range(NUM_CONNECTIONS)]
            for number, plain in enumerate(open_ones):
                content = (b"", huge + b"x" * 1000, greeting)[number % 3]
                for byte in content[:80]:
                    if not _sent(plain, bytes([byte])):
                        break
            for plain in open_ones:
                plain.close()

    _assert_undisturbed(keyed_cluster, disturb)


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
