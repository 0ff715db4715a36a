"""A process of a busy cluster dies without a word. Nobody may wait for ever, and no token may be wrong."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from support.asking import CONNECTION_LOST, NO_NODE, answers, answers_while, assert_right, random_asks
from support.cluster import Cluster, running
from support.cluster_config import cluster_config, d, fake_engine, m, p

NUM_REQUESTS = 60
ANSWERED_BEFORE = 10
FATAL = 383


@pytest.mark.fault("F13")
@pytest.mark.parametrize("node", ["d0", "d1", "p0"])
def test_node_is_killed_under_load(fake_cluster: Cluster, node: str) -> None:
    assert_admitted_requests_survive(fake_cluster, node, fake_cluster.pid(node))


@pytest.mark.fault("F13")
@pytest.mark.parametrize("node", ["p0", "d2"])
def test_messager_is_killed_under_load(fake_cluster: Cluster, node: str) -> None:
    assert_admitted_requests_survive(fake_cluster, node, fake_cluster.messager_pid(node))


@pytest.mark.fault("F13")
def test_router_is_killed_under_load(fake_cluster: Cluster) -> None:
    victim, nodes = fake_cluster.pid("router"), fake_cluster.incarnations()
    asks = random_asks(12, NUM_REQUESTS, max_tokens=60)

    given = answers_while(fake_cluster, asks, lambda: os.kill(victim, signal.SIGKILL), limit=20, first=ANSWERED_BEFORE)

    num_right = assert_right(fake_cluster, asks, given, CONNECTION_LOST)
    assert ANSWERED_BEFORE <= num_right < NUM_REQUESTS
    fake_cluster.wait_until_up()
    assert_serving(fake_cluster)
    assert fake_cluster.incarnations() == nodes


def test_a_device_is_lost_under_load(model: Path) -> None:
    """The node leaves and is replaced; what it was asked is answered by the other."""
    sound, breaks = fake_engine(step_s=0.002), fake_engine(step_s=0.002, fatal_token=FATAL)
    config = cluster_config(model, m("m0", engine=breaks), m("m1"), engine=sound, router={"max_attempts": 20})
    asks = random_asks(15, NUM_REQUESTS, max_tokens=20)
    asks = [replace(ask, prompt=[*ask.prompt, FATAL]) if number % 10 == 9 else ask for number, ask in enumerate(asks)]

    with running(config) as cluster:
        incarnation = cluster.incarnations()["m0"]

        given = answers(cluster, asks, limit=20)

        assert assert_right(cluster, asks, given) == len(asks)
        cluster.wait_until_restarted("m0", incarnation)
        cluster.wait_until_up()
        cluster.wait_until_quiescent()
        assert "device lost" in cluster.log()
        assert "exited with 1" in cluster.log()


@pytest.mark.fault("F13")
def test_one_process_after_the_other_is_killed_under_load(model: Path) -> None:
    """Nodes and messagers of 2P3D in a random order, the next as soon as the last has been replaced."""
    rng = random.Random(14)
    config = cluster_config(
        model,
        *(p(f"p{index}") for index in range(2)),
        *(d(f"d{index}") for index in range(3)),
        router={"max_attempts": 20},
        engine=fake_engine(step_s=0.005),
    )
    asks = random_asks(14, 250, max_tokens=60)

    with running(config) as cluster:

        def kill_four() -> None:
            for node in rng.sample(["p0", "p1", "d0", "d1", "d2"], 4):
                incarnation = cluster.incarnations()[node]
                find_victim = cluster.messager_pid if rng.random() < 0.5 else cluster.pid
                os.kill(find_victim(node), signal.SIGKILL)
                cluster.wait_until_restarted(node, incarnation)

        given = answers_while(cluster, asks, kill_four, limit=20, first=ANSWERED_BEFORE)

        assert assert_right(cluster, asks, given) == len(asks)
        assert cluster.status()["requests"]["nodes_lost"] == 4
        assert_serving(cluster)


def assert_admitted_requests_survive(cluster: Cluster, node: str, victim: int) -> None:
    """Kill process ``victim`` of ``node`` under load: new requests may be refused if nobody can stand in, no other."""
    incarnation, before = cluster.incarnations()[node], cluster.status()["requests"]
    asks = random_asks(10, NUM_REQUESTS, max_tokens=60)

    given = answers_while(cluster, asks, lambda: os.kill(victim, signal.SIGKILL), limit=20, first=ANSWERED_BEFORE)

    num_right = assert_right(cluster, asks, given, NO_NODE)
    cluster.wait_until_restarted(node, incarnation)
    after = cluster.status()["requests"]
    assert after["finished"] - before["finished"] == num_right > ANSWERED_BEFORE
    assert after["failed"] == before["failed"]
    assert after["nodes_lost"] == before["nodes_lost"] + 1
    assert_serving(cluster)


def assert_serving(cluster: Cluster) -> None:
    """Check that ``cluster`` is quiescent and gives right answers, over every node."""
    cluster.wait_until_quiescent()
    asks = random_asks(13, 24)
    assert assert_right(cluster, asks, answers(cluster, asks)) == len(asks)
