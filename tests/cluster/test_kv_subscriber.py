"""KV events of real nodes: a subscriber that comes late knows what the nodes' prefix caches have."""

from __future__ import annotations

import random
from pathlib import Path

import zmq
from support.asking import answers, assert_right, random_asks, random_prompt
from support.cluster import PATIENCE_S, running, until
from support.cluster_config import cluster_config, d, fake_engine, p
from support.kv_subscriber import KVSubscriber
from support.ports import free_ports


def test_a_late_subscriber_knows_the_prefix_caches(model: Path) -> None:
    ports = free_ports(10)[-4:]
    config = cluster_config(model, p(), d(), cache={"num_blocks": 64}, engine=fake_engine())
    taken = {node["port"] for node in config["nodes"]} | {config["router"]["port"], config["router"]["admin_port"]}
    addresses = [f"tcp://127.0.0.1:{port}" for port in ports if port not in taken]
    for node, endpoint, replay in zip(config["nodes"], addresses[::2], addresses[1::2], strict=True):
        node["kv_events"] = {"endpoint": endpoint, "replay_endpoint": replay}
    with running(config) as cluster, zmq.Context() as context:
        asks = random_asks(11, 60, longest=150, shared=random_prompt(random.Random(1), 40))
        assert_right(cluster, asks, answers(cluster, asks, limit=8))
        cluster.wait_until_quiescent()
        for node in cluster.config.nodes:
            num_published = cluster.loads()[node.name]["evictable_blocks"]
            until(
                f"all events of {node.name}",
                lambda node=node, count=num_published: num_known(context, str(node.kv_events.replay_endpoint)) == count,  # type: ignore[misc]
            )
            assert num_published > 0


def num_known(context: zmq.Context[zmq.Socket[bytes]], replay: str) -> int:
    """Return how many blocks somebody knows who has had all past events repeated."""
    subscriber = KVSubscriber(16)
    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        socket.connect(replay)
        socket.send_multipart([b"", bytes(8)])
        while payload := socket.recv_multipart()[2]:
            subscriber.take(payload)
    return len(subscriber.blocks)
