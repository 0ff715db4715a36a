"""KV events on ZMQ sockets: in order, again on request, and never in the way of the node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import zmq
from support.cluster import until
from support.kv_subscriber import KVSubscriber
from support.ports import free_ports

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.config.kv_events import KVEventsConfig
from kvrelay.errors import ConfigError
from kvrelay.machine.contract import PublishKVEvents
from kvrelay.node import kv_event_publisher
from kvrelay.node.kv_event_publisher import MAX_REQUESTS_AT_ONCE, REPLAY_END, REQUEST_PAUSE_S, KVEventPublisher
from kvrelay.protocol.kv_events import BlockRemoved, BlockStored, KVEvent

PATIENCE_MS = 60_000
KEY = "nodes.p0.kv_events"


class Node:
    """A publisher with its addresses, and the sockets of its clients."""

    def __init__(self, **options: Any) -> None:
        events, replay = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
        self.config = KVEventsConfig(endpoint=events, replay_endpoint=replay, **options)
        self.publisher = KVEventPublisher(KEY, self.config, "kv@p0@demo")
        self.context = zmq.Context()

    def publish(self, *events: KVEvent, count: int = 1) -> None:
        """Publish batches with ``events``."""
        for number in range(count):
            self.publisher.publish(PublishKVEvents(float(number), list(events or [stored(number)])))

    def subscriber(self, hwm: int = 1000) -> zmq.Socket[bytes]:
        """Return a subscriber that gets what is published from now on."""
        socket = self.context.socket(zmq.SUB)
        socket.set_hwm(hwm)
        if hwm == 1:
            socket.setsockopt(zmq.RCVBUF, 1 << 16)  # some systems would hold all of a test's batches
        socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
        socket.setsockopt(zmq.SUBSCRIBE, b"kv@")
        socket.connect(str(self.config.endpoint))

        def has_the_newest() -> bool:
            self.publish(BlockRemoved([]))
            newest = self.publisher._next_number - 1
            while socket.poll(20):
                if int.from_bytes(socket.recv_multipart()[1], "big") == newest:
                    return True
            return False

        until("it is subscribed, and has taken all there was", has_the_newest)
        return socket

    def asker(self) -> zmq.Socket[bytes]:
        """Return a client that may ask for replays."""
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
        socket.connect(str(self.config.replay_endpoint))
        return socket

    def replay(self, first: int) -> list[tuple[int, bytes]]:
        """Return number and payload of all batches from ``first`` on that a replay has."""
        with self.asker() as socket:
            socket.send_multipart([b"", first.to_bytes(8, "big")])
            batches: list[tuple[int, bytes]] = []
            while True:
                empty, number, payload = socket.recv_multipart()
                assert empty == b""
                if number == REPLAY_END:
                    assert payload == b""
                    return batches
                batches.append((int.from_bytes(number, "big"), payload))


def stored(number: int) -> BlockStored:
    """Return the event of the first block of a prompt."""
    return BlockStored([number], None, [number], 1)


@contextmanager
def running(**options: int) -> Iterator[Node]:
    """Run a publisher; the sockets of clients are closed at the end."""
    node = Node(**options)
    try:
        with node.publisher:
            yield node
    finally:
        node.context.destroy(linger=0)


def test_messages_have_topic_number_and_payload() -> None:
    with running() as node:
        subscriber = node.subscriber()
        node.publish(count=3)
        received = [subscriber.recv_multipart() for _ in range(3)]

    assert {topic for topic, _, _ in received} == {b"kv@p0@demo"}
    numbers = [int.from_bytes(number, "big") for _, number, _ in received]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert all(len(number) == 8 for _, number, _ in received)
    consumer = KVSubscriber(1)
    for _, _, payload in received:
        consumer.take(payload)
    assert consumer.blocks == {number: (None, [number]) for number in range(3)}


def test_a_late_subscriber_gets_the_past_by_replay() -> None:
    with running() as node:
        node.publish(count=300)
        until("all are sent", lambda: len(node.replay(0)) == 300)
        assert [number for number, _ in node.replay(0)] == list(range(300))
        assert [number for number, _ in node.replay(297)] == [297, 298, 299]
        assert node.replay(300) == []


def test_the_past_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(buffer_batches=10) as node:
        node.publish(count=50)
        until("all are sent", lambda: [number for number, _ in node.replay(0)] == list(range(40, 50)))
    monkeypatch.setattr(kv_event_publisher, "MAX_BUFFER_BYTES", 200)
    with running() as node:
        node.publish(count=50)
        until("all are sent", lambda: (kept := node.replay(0)) and kept[-1][0] == 49)
        assert sum(len(payload) for _, payload in node.replay(0)) <= 200


def test_what_the_thread_does_not_take_is_bounded_and_leaves_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_event_publisher, "MAX_QUEUED_BATCHES", 3)
    node = Node()
    try:
        node.publish(count=5)  # its thread has not begun
        with node.publisher:
            until("three are sent", lambda: len(node.replay(0)) == 3)
            node.publish()
            until("the fourth is sent", lambda: [number for number, _ in node.replay(0)] == [0, 1, 2, 5])
    finally:
        node.context.destroy(linger=0)


def test_a_slow_subscriber_loses_messages_and_holds_nobody_up() -> None:
    with running(hwm=1) as node:
        slow, quick = node.subscriber(hwm=1), node.subscriber()
        tokens = list(range(20_000))
        for number in range(400):
            node.publish(BlockStored([number], None, tokens, 20_000))
        until("all are sent", lambda: (kept := node.replay(0)) and kept[-1][0] >= 399, patience_s=120.0)
        node.publish(BlockRemoved([1]))
        numbers = set()
        while slow.poll(500):
            numbers.add(int.from_bytes(slow.recv_multipart()[1], "big"))
        assert len(numbers) < 400
        assert quick.poll(PATIENCE_MS)


def test_clients_that_do_not_read_replays_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(hwm=1) as node:
        tokens = list(range(50_000))
        node.publish(BlockStored([1], None, tokens, 50_000), count=200)
        until("all are sent", lambda: len(node.replay(0)) == 200)
        monkeypatch.setattr(kv_event_publisher, "REPLAY_TIMEOUT_S", 1.0)  # the last client must not be as slow
        deaf = [node.asker() for _ in range(kv_event_publisher.MAX_REPLAYS + 2)]
        for socket in deaf:
            socket.set_hwm(1)
            socket.send_multipart([b"", bytes(8)])
        assert len(node.replay(0)) == 200


@pytest.mark.parametrize("frames", [[b""], [b"x"], [b"", b""], [b"", b"123"], [b"", bytes(8), b""], [b"", b"9" * 4000]])
def test_anything_else_is_no_request(frames: list[bytes]) -> None:
    with running() as node:
        node.publish(count=2)
        with node.asker() as socket:
            socket.send_multipart(frames)
            until("both are sent", lambda: len(node.replay(0)) == 2)
            assert not socket.poll(0)


class Flood:
    """The socket of clients that never stop asking."""

    def __init__(self, frames: list[bytes]) -> None:
        self.frames = frames
        self.num_read = 0

    def poll(self, _: int) -> int:
        return zmq.POLLIN

    def recv_multipart(self, _: int) -> list[bytes]:
        self.num_read += 1
        assert self.num_read < 1000
        return [b"%d" % self.num_read, *self.frames]

    def send_multipart(self, *_: object) -> None:
        """Take a batch."""


@pytest.mark.parametrize("frames", [[b"x"], [b"", bytes(8)]], ids=["malformed", "valid"])
def test_a_flood_of_requests_is_read_bit_by_bit(frames: list[bytes]) -> None:
    """Before, malformed ones were read until there were none left, and no event was sent meanwhile."""
    flood = Flood(frames)
    replays = kv_event_publisher._Replays(cast(Any, flood), 10)
    for step in range(100):
        now = step * REQUEST_PAUSE_S / 10
        replays.serve(now)
        assert replays.poll_ms(now) > 0
    assert 10 <= flood.num_read <= 11 * MAX_REQUESTS_AT_ONCE


@pytest.mark.parametrize("which", ["endpoint", "replay_endpoint"])
def test_an_address_in_use_is_named(which: str) -> None:
    with running() as node:
        (free,) = free_ports(1)
        addresses = {"endpoint": f"tcp://127.0.0.1:{free}", which: getattr(node.config, which)}
        with pytest.raises(ConfigError, match=rf"nodes.p0.kv_events.{which}: cannot listen at tcp://127\.0\.0\.1"):
            KVEventPublisher(KEY, KVEventsConfig(**addresses), "topic")


NODES = [{"name": "p0", "role": "prefill", "port": 8200}, {"name": "d0", "role": "decode", "port": 8300}]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda data: data.update(kv_events={"endpoint": "tcp://127.0.0.1:5557"}),
            "nodes.d0.kv_events.endpoint: 127.0.0.1:5557 is also the address of the KV events of node p0",
        ),
        (
            lambda data: data["nodes"][0].update(metrics_port=8300),
            "nodes.p0.metrics_port: 127.0.0.1:8300 is also the address of node d0",
        ),
        (
            lambda data: data["nodes"][0].update(kv_events={"replay_endpoint": "tcp://127.0.0.1:5558"}),
            "nodes.p0.kv_events.replay_endpoint: needs kv_events.endpoint",
        ),
    ],
)
def test_config_names_what_cannot_be(change: Callable[[dict[str, object]], None], problem: str) -> None:
    data: dict[str, object] = {"nodes": [dict(node) for node in NODES]}
    change(data)
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.from_data(data)
    assert any(problem in line for line in caught.value.problems)
