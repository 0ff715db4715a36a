"""Whatever comes in at a port that is no message of ours, or not from whom it says: nobody dies, nothing grows."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgpack
import psutil
import pytest
import zmq
from support.asking import answers, answers_while, assert_right, random_asks
from support.cluster import Cluster
from support.messages import EXAMPLES

from kvrelay.engine.fake import fake_geometry
from kvrelay.protocol.codec import encode
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import NodeId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, ProtocolViolation
from kvrelay.protocol.messages.messager_to_messager import LinkHello, LinkOffer
from kvrelay.protocol.messages.node_to_router import Drained, Leaving, Register
from kvrelay.protocol.messages.prefill_to_decode import ReserveBlocks
from kvrelay.protocol.messages.router_to_node import Abort

pytestmark = pytest.mark.fault("F28")

NUM_CONNECTIONS = 20


@pytest.fixture
def ports(fake_cluster: Cluster) -> list[int]:
    """Every port a process of the cluster listens at."""
    found = fake_cluster.listening()
    # The router's three, one of each node and one of each messager.
    assert len(found) == 3 + 4 + 4
    return sorted(found)


@pytest.fixture
def files(fake_cluster: Cluster) -> list[Path]:
    """Every ipc socket a process of the cluster listens at; those of killed ones lie about until the cluster ends."""
    bound = {
        str(connection.laddr)
        for pid in fake_cluster.lasting()
        for connection in psutil.Process(pid).net_connections("unix")
    }
    found = [path for path in fake_cluster.runtime_files() if str(path) in bound]
    assert len(found) == 4 + 4
    return found


@pytest.fixture(autouse=True)
def same_processes(fake_cluster: Cluster) -> Iterator[None]:
    """Fail a test that costs a process its life, or lets one grow."""
    before = fake_cluster.memory()
    yield
    after = fake_cluster.memory()
    assert after.keys() == before.keys()
    assert all(after[pid] - before[pid] < 64 << 20 for pid in before)


def byte_strings() -> list[bytes]:
    rng = random.Random(40)
    huge = struct.pack(">Q", 1 << 62)
    greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01NULL".ljust(65, b"\0")
    return [
        b"",
        b"\0",
        rng.randbytes(10_000),
        b"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"\xff" + huge + b"\x7f" + rng.randbytes(1000),
        greeting + b"\x06" + huge + rng.randbytes(100),
        greeting + rng.randbytes(1000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
    ]


def test_random_bytes_on_every_port(fake_cluster: Cluster, ports: list[int], files: list[Path]) -> None:
    def disturb() -> None:
        for content in byte_strings():
            for port in ports:
                with socket.create_connection(("127.0.0.1", port)) as plain:
                    say(plain, content)
            for path in files:
                with socket.socket(socket.AF_UNIX) as plain:
                    plain.connect(str(path))
                    say(plain, content)

    assert_unmoved(fake_cluster, disturb)


def say(plain: socket.socket, content: bytes) -> None:
    """Send ``content``; the other side may hang up meanwhile."""
    try:
        plain.sendall(content)
    except (BrokenPipeError, ConnectionResetError):
        return


def messages() -> list[list[bytes]]:
    """Multipart messages as only a broken or foreign peer sends them."""
    rng = random.Random(41)
    pack = msgpack.packb
    return [
        [b""],
        [rng.randbytes(100)],
        [rng.randbytes(20_000_000)],
        [b"\xdd\xff\xff\xff\xff"],
        [b"\x91" * 100_000],
        [pack([])],
        [pack(["Hello", {}])],
        [pack(["Message", {}])],
        [pack(["Heartbeat", {"load": 7}])],
        [pack(["Heartbeat", {}, 1])],
        [pack({"Heartbeat": {}})],
        [pack(["Abort", {"request_id": "x"}])],
        [pack(["Abort", {"request_id": 1, "epoch": "x"}])],
        [pack(["Prefill", {"request": {}, "decode_node": None}])],
        [pack(["KVFrame", {"request_id": "x", "epoch": -(1 << 63)}])],
        [pack(["Heartbeat", {}]), *[b"x"] * 100],
        [b"", b"", b""],
    ]


def test_messages_that_are_none(fake_cluster: Cluster, ports: list[int], files: list[Path]) -> None:
    assert_unmoved(fake_cluster, lambda: say_all(addresses(fake_cluster, ports, files), messages()))


def test_every_message_from_somebody_unknown(fake_cluster: Cluster, ports: list[int], files: list[Path]) -> None:
    """Each is right in itself, and nobody's business where it arrives."""
    sent = [[encode(message)] for message in EXAMPLES]

    assert_unmoved(fake_cluster, lambda: say_all(addresses(fake_cluster, ports, files), sent))


def test_strangers_that_offer_links(fake_cluster: Cluster, ports: list[int], files: list[Path]) -> None:
    """The geometry is right, so that D's messager looks at the offers: of no kind, or with handles that are none.

    Not of the kind nixl, whose library opens ports where it is installed: they would be taken for the cluster's own.
    """
    geometry = fake_geometry(fake_cluster.fake(), 16)
    handles = [
        b"",
        b"\xff",
        b"host",
        b'{"type": "host", "pid": 1, "fd": 0, "tag": "x", "num_blocks": 4}',
        b'{"type": "device", "pid": 1, "memory": "", "num_blocks": -1}',
        b'{"x": ' + b"[" * 30_000,
        b"\x81\xa1x" + b"\x91" * 30_000,
    ]
    sent = [
        [encode(LinkHello(geometry=geometry, offers=[LinkOffer(kind, handle)]))]
        for kind in ("shm", "cuda", "tcp", "x")
        for handle in handles
    ]

    assert_unmoved(fake_cluster, lambda: say_all(addresses(fake_cluster, ports, files), sent))


def test_anything_in_the_names_of_live_peers(fake_cluster: Cluster, ports: list[int], files: list[Path]) -> None:
    """A stranger that has learned the peer ids of all processes, which only logs show, ends nothing and blocks nobody.

    Before, its connection took the place of the peer's own, and one garbage message made the receiver deaf to the peer.
    """
    asks = random_asks(43, 24)
    assert assert_right(fake_cluster, asks, answers(fake_cluster, asks)) == len(asks)  # every pair is connected now
    nodes = sorted(set(re.findall(r"node registered.*node=(\w+#[0-9a-f]+)", fake_cluster.log())))
    messagers = [node.replace("#", ".messager#") for node in nodes]
    assert len(nodes) >= 4
    before = fake_cluster.incarnations()
    sent = [
        [b"\xc1"],
        [encode(ProtocolViolation(reason="no"))],
        [encode(Heartbeat())],
        [encode(Leaving())],
        [encode(Drained())],
        [encode(Abort(request_id=RequestId("x"), epoch=1))],
    ]

    def disturb() -> None:
        where = addresses(fake_cluster, ports, files)
        for name in [*nodes, *messagers, "router", "messager"]:
            say_all(where, sent, name)

    assert_unmoved(fake_cluster, disturb)
    assert fake_cluster.incarnations() == before


def test_rogue_nodes_and_prefill_nodes_that_nobody_knows(
    fake_cluster: Cluster, ports: list[int], files: list[Path]
) -> None:
    """A stranger registers as a mixed node, in the place of d0 and with another geometry, and reserves all blocks."""
    d0 = fake_cluster.config.node("d0")
    before = fake_cluster.incarnations()

    def disturb() -> None:
        for name, role, address, layers in [
            ("m9", "mixed", "tcp://127.0.0.1:9", 4),
            ("d0", "mixed", d0.address, 4),
            ("d0", "decode", d0.address, 4),
            ("d0", "decode", d0.address, 9),
        ]:
            geometry = KVGeometry(layers, 2, 8, 16, "uint8", "fake-384")
            register = Register(
                node_id=NodeId(name),
                incarnation="bad",
                role=role,
                address=address,
                pid=1,
                model="demo",
                max_model_len=4096,
                max_num_seqs=64,
                num_blocks=1024,
                geometry=geometry,
            )
            say_all([fake_cluster.config.router.control], [[encode(register)]] * 5, f"{name}#bad")
        reserve = [
            [
                encode(
                    ReserveBlocks(
                        request_id=RequestId(f"x{number}"), epoch=1, block_hashes=[], num_tokens=8000, max_tokens=100
                    )
                )
            ]
            for number in range(20)
        ]
        say_all([node.address for node in fake_cluster.config.nodes], reserve)

    assert_unmoved(fake_cluster, disturb)
    assert fake_cluster.incarnations() == before


def addresses(cluster: Cluster, ports: Sequence[int], files: Sequence[Path]) -> list[str]:
    http = {cluster.config.router.port, cluster.config.router.admin_address[1]}
    return [*(f"tcp://127.0.0.1:{port}" for port in ports if port not in http), *(f"ipc://{path}" for path in files)]


def say_all(where: Sequence[str], sent: Sequence[Sequence[bytes]], name: str | None = None) -> None:
    """Send each message to each address from a stranger of its own, or all from strangers that use ``name``."""
    for address in where:
        # A context for each: closed sockets count against its limit while they linger.
        with zmq.Context() as context:
            for number, parts in enumerate(sent):
                with context.socket(zmq.DEALER) as dealer:
                    dealer.setsockopt(zmq.ROUTING_ID, (name or f"stranger#{number}").encode())
                    dealer.setsockopt(zmq.LINGER, 1000)
                    # A private channel ends the connection, and nothing can be queued then.
                    dealer.setsockopt(zmq.SNDTIMEO, 0)
                    dealer.connect(address)
                    with contextlib.suppress(zmq.Again):
                        dealer.send_multipart(parts)


def assert_unmoved(cluster: Cluster, disturb: object) -> None:
    """Check that requests get right answers while ``disturb`` runs, and afterwards."""
    asks = random_asks(42, 60)
    given = answers_while(cluster, asks, disturb, limit=4, first=2)  # type: ignore[arg-type]
    assert assert_right(cluster, asks, given) == len(asks)
    cluster.wait_until_quiescent()
    assert assert_right(cluster, asks[:10], answers(cluster, asks[:10])) == 10
