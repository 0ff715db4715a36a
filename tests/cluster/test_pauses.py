"""A process stands still for longer than the peer timeout and goes on. Clients see a pause and no error."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.asking import Ask, answers_while, assert_right, random_asks
from support.cluster import Cluster, running, until
from support.cluster_config import Config, cluster_config, d, fake_engine, p
from support.redis_server import binary, redis_server

pytestmark = pytest.mark.fault("F09")

PEER_TIMEOUT_S = 2.0
PAUSE_S = 5.0
DAY_S = 86_400

REGISTRIES = [
    "static",
    pytest.param("redis", marks=pytest.mark.skipif(binary() is None, reason="no redis-server on this machine")),
]


def _logged_s(line: str) -> float:
    """Return the time of day at which ``line`` was logged, in seconds."""
    hours, minutes, seconds = line.split("|")[1].split(maxsplit=1)[0].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def lines_of(cluster: Cluster, name: str) -> list[str]:
    """Return what the node called ``name`` and its messager have logged."""
    return [line for line in cluster.log().splitlines() if line.lstrip().startswith(f"{name} |")]


def told(cluster: Cluster, name: str) -> list[str]:
    """Return the lines about a pause of PAUSE_S or more. On a busy machine there may be others, of a second or two."""
    pauses = [(re.search(r"did not run paused_s=([\d.]+)", line), line) for line in lines_of(cluster, name)]
    return [line for pause, line in pauses if pause is not None and float(pause[1]) >= PAUSE_S - 0.1]


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Let these processes stand still meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(params=REGISTRIES)
def cluster(model: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with ExitStack() as stack:
        sections: Config = {"cluster": {"peer_timeout_s": PEER_TIMEOUT_S}, "engine": fake_engine(step_s=0.005)}
        if request.param == "redis":
            server = stack.enter_context(redis_server())
            sections["registry"] = {"kind": "redis", "url": f"redis://127.0.0.1:{server.port}/0"}
        config = cluster_config(model, p("p0"), p("p1"), d("d0"), d("d1"), **sections)
        yield stack.enter_context(running(config))


def test_the_router_stands_still_under_load(cluster: Cluster) -> None:
    """It loses no node. Nodes that gave it up (a registry) begin its requests again."""
    asks = [Ask(ask.prompt, 400, ask.temperature, ask.seed) for ask in random_asks(61, 32)]
    pid, before = cluster.pid("router"), cluster.status()["requests"]

    def stop() -> None:
        with stopped([pid]):
            time.sleep(PAUSE_S)

    given = answers_while(cluster, asks, stop, limit=16, first=4)

    assert assert_right(cluster, asks, given) == len(asks)
    after = cluster.status()["requests"]
    assert after["nodes_lost"] == before["nodes_lost"]
    assert after["failed"] == before["failed"]
    cluster.wait_until_quiescent()


@pytest.mark.parametrize("name", ["p0", "d0"])
def test_a_node_stands_still_under_load(cluster: Cluster, name: str) -> None:
    """It and its messager are given up and come back; they give nobody up themselves."""
    asks = [Ask(ask.prompt, 100, ask.temperature, ask.seed) for ask in random_asks(62, 60)]
    pids = [cluster.pid(name), cluster.messager_pid(name)]
    incarnation = cluster.incarnations()[name]

    def stop() -> None:
        with stopped(pids):
            time.sleep(PAUSE_S)

    given = answers_while(cluster, asks, stop, limit=16, first=4)

    assert assert_right(cluster, asks, given) == len(asks)
    until(f"{name} is back", lambda: cluster.incarnations().get(name) == incarnation)
    cluster.wait_until_quiescent()
    until("both have told of their pause", lambda: len(told(cluster, name)) == len(pids))
    resumed_s = max(_logged_s(line) for line in told(cluster, name))
    lines = lines_of(cluster, name)
    # Those who gave it up have ended its links. It may find out by their silence, but no sooner than that of others.
    assert all((_logged_s(line) - resumed_s) % DAY_S > PEER_TIMEOUT_S - 0.2 for line in lines if "no heartbeat" in line)
