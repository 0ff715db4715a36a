"""Nodes and clusters that are told to end while they are busy."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.asking import CONNECTION_LOST, NO_NODE, answers_while, assert_right, random_asks
from support.cluster import assert_ended_well, has_ended, running, until
from support.cluster_config import cluster_config, d, fake_engine, p


@pytest.mark.fault("F20")
def test_drained_nodes_fail_no_request(model: Path) -> None:
    """Two nodes are ended by a signal and come back, one is stopped for good, while others of their kind go on."""
    config = cluster_config(model, p("p0"), p("p1"), d("d0"), d("d1"), d("d2"), engine=fake_engine(step_s=0.005))
    asks = random_asks(20, 80, max_tokens=60)

    with running(config) as cluster:
        pids = {name: cluster.pid(name) for name in ("p0", "d0", "d1")}
        back = {"p0", "p1", "d0", "d2"}

        def drain() -> None:
            os.kill(pids["p0"], signal.SIGTERM)
            os.kill(pids["d0"], signal.SIGTERM)
            assert cluster.admin.post("/cluster/nodes/d1/stop").status_code == 202
            until("the drained nodes have ended", lambda: all(map(has_ended, pids.values())))
            until("those are back that were not stopped", lambda: set(cluster.incarnations()) == back)

        given = answers_while(cluster, asks, drain, limit=20, first=10)

        assert assert_right(cluster, asks, given) == len(asks)
        status = cluster.status()
        assert {node["name"] for node in status["nodes"]} == back
        until("d1 stays away", lambda: "d1 exited with 3; not restarting it" in cluster.log())
        assert status["requests"]["nodes_lost"] == status["requests"]["failed"] == 0


def test_supervisor_is_told_to_end_under_load(model: Path) -> None:
    """What runs is finished, what comes later is refused, and nothing is left."""
    config = cluster_config(model, p(), d(), engine=fake_engine(step_s=0.01))
    asks = random_asks(21, 400, max_tokens=60)  # refused ones cost no time

    with running(config) as cluster:
        given = answers_while(cluster, asks, lambda: cluster.process.send_signal(signal.SIGTERM), limit=20, first=10)

        num_right = assert_right(cluster, asks, given, CONNECTION_LOST, NO_NODE)
        assert 10 < num_right < len(asks)
        assert_ended_well(cluster)


def test_supervisor_is_told_twice_and_does_not_wait(model: Path) -> None:
    config = cluster_config(model, p(), d(), engine=fake_engine(step_s=0.05))
    asks = random_asks(22, 20, max_tokens=1000)

    def impatient() -> None:
        def press() -> bool:
            cluster.process.send_signal(signal.SIGINT)
            return "killing" in cluster.log()

        until("it does not wait any longer", press)

    with running(config) as cluster:
        given = answers_while(cluster, asks, impatient, limit=20, first=1)

        assert_right(cluster, asks, given, CONNECTION_LOST, NO_NODE)
        assert_ended_well(cluster)


def test_one_request_to_end_that_comes_as_two_signals_is_no_hurry(model: Path) -> None:
    """As from ``timeout``, which signals the process and then its group."""
    config = cluster_config(model, p(), d(), engine=fake_engine(step_s=0.01))
    asks = random_asks(23, 20, max_tokens=60)

    def twice() -> None:
        cluster.process.send_signal(signal.SIGTERM)
        os.killpg(cluster.process.pid, signal.SIGTERM)

    with running(config) as cluster:
        given = answers_while(cluster, asks, twice, limit=20, first=1)

        assert assert_right(cluster, asks, given, NO_NODE, CONNECTION_LOST) > 1
        assert_ended_well(cluster)
        assert "killing" not in cluster.log()
        assert "aborted" not in cluster.log()


def test_supervisor_is_killed_and_nothing_outlives_it(model: Path) -> None:
    config = cluster_config(model, p(), d(), engine=fake_engine())

    with running(config) as cluster:
        os.kill(cluster.process.pid, signal.SIGKILL)
        cluster.process.wait()

        until("all its processes have ended", lambda: not cluster.pids())
