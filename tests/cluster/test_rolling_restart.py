"""Operators drain and restart what runs: clients see pauses and no errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest
from support.asking import Ask, answers, answers_while, assert_right, random_asks
from support.cluster import PATIENCE_S, Cluster, running, until
from support.cluster_config import cluster_config, d, fake_engine, p


def kvrelay(cluster: Cluster, *arguments: str) -> str:
    """Run an operator's command; return what it says."""
    command = [str(Path(sys.executable).with_name("kvrelay")), *arguments, "--url", str(cluster.admin.base_url)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def long_asks(seed: int, count: int) -> list[Ask]:
    return [Ask(ask.prompt, 400, ask.temperature, ask.seed) for ask in random_asks(seed, count)]


@pytest.mark.fault("F20")
def test_all_nodes_are_restarted_one_after_another_under_load(model: Path) -> None:
    """2P2D with 16 streams. D's deadline is short: what it cannot finish goes on elsewhere."""
    config = cluster_config(
        model,
        p("p0"),
        p("p1"),
        d("d0"),
        d("d1"),
        cluster={"drain_timeout_s": 1.0},
        engine=fake_engine(step_s=0.01),
    )
    asks = long_asks(71, 64)

    with running(config) as cluster:
        before = cluster.incarnations()
        said: list[str] = []
        given = answers_while(
            cluster, asks, lambda: said.append(kvrelay(cluster, "restart", "--rolling")), limit=16, first=2
        )

        assert assert_right(cluster, asks, given) == len(asks)
        assert [line for line in said[0].splitlines() if line.endswith("is back")] == [
            f"{name} is back" for name in ("d0", "d1", "p0", "p1")
        ]
        after = cluster.incarnations()
        assert {name for name, incarnation in after.items() if incarnation != before[name]} == set(before)
        requests = cluster.status()["requests"]
        assert requests["failed"] == requests["refused"] == requests["nodes_lost"] == 0
        assert requests["retries"] > 0
        cluster.wait_until_quiescent()


def test_after_a_reset_of_the_prefix_caches_prompts_are_computed_anew(fake_cluster: Cluster) -> None:
    body = {"model": "demo", "prompt": list(range(100)), "max_tokens": 1, "temperature": 0}

    def num_cached() -> int:
        usage = fake_cluster.http.post("/v1/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    num_cached()
    assert num_cached() > 0
    said = kvrelay(fake_cluster, "reset-prefix-cache").splitlines()
    assert sorted(line.partition(",")[0] for line in said) == ["d0 reset", "d1 reset", "d2 reset", "p0 reset"]
    assert num_cached() == 0
    assert num_cached() > 0


def test_a_drained_node_comes_back_and_a_stopped_one_does_not(model: Path) -> None:
    config = cluster_config(model, p(), d("d0"), d("d1"), d("d2"), engine=fake_engine())
    with running(config) as cluster:
        incarnation, pid = cluster.incarnations()["d0"], cluster.pid("d1")
        assert kvrelay(cluster, "drain", "d0").splitlines() == ["d0 drains", "d0 has left"]
        assert kvrelay(cluster, "drain", "d1", "--stop").splitlines() == ["d1 drains", "d1 has left"]
        cluster.wait_until_restarted("d0", incarnation)
        until("d1 has ended", lambda: not psutil.pid_exists(pid))
        until("it is not started again", lambda: "d1 exited with 3; not restarting it" in cluster.log())
        asks = random_asks(72, 12)
        assert assert_right(cluster, asks, answers(cluster, asks)) == len(asks)
        assert set(cluster.incarnations()) == {"p0", "d0", "d2"}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_connections_that_come_while_the_router_restarts_wait_for_the_next_one(model: Path, sign: int) -> None:
    config = cluster_config(model, p(), d(), engine=fake_engine())
    ask = random_asks(74, 1)[0]
    with running(config) as cluster:
        pid = cluster.pid("router")
        os.kill(pid, sign)
        until("the router has ended", lambda: not psutil.pid_exists(pid))
        address = (cluster.config.router.host, cluster.config.router.port)
        waiting = [HTTPConnection(*address, timeout=PATIENCE_S) for _ in range(20)]
        for connection in waiting:
            connection.request("POST", "/v1/completions", json.dumps(ask.body), {"content-type": "application/json"})
        for connection in waiting:
            answer = connection.getresponse()
            choice = json.loads(answer.read())["choices"][0]
            assert (answer.status, choice["token_ids"]) == (200, ask.expected(cluster.fake()))
            connection.close()


@pytest.mark.parametrize("keep_alive", [False, True], ids=["new connections", "kept connections"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_router_is_restarted_under_load(model: Path, workers: int, keep_alive: bool) -> None:
    """What it has is finished, what comes meanwhile waits for the next one, and the nodes stay."""
    config = cluster_config(model, p(), d(), engine=fake_engine(step_s=0.005), router={"workers": workers})
    asks = [Ask(ask.prompt, 100, ask.temperature, ask.seed) for ask in random_asks(73, 96)]
    with running(config) as cluster:
        pid, before = cluster.pid("router"), cluster.incarnations()

        def restart() -> None:
            os.kill(pid, signal.SIGTERM)
            until("another router runs", lambda: not psutil.pid_exists(pid))

        given = answers_while(cluster, asks, restart, limit=16, first=2, keep_alive=keep_alive)
        assert assert_right(cluster, asks, given) == len(asks)
        assert cluster.pid("router") != pid
        cluster.wait_until_up()
        assert cluster.incarnations() == before
        cluster.wait_until_quiescent()
