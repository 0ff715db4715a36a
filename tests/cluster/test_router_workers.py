"""A router with two worker processes: the tokens, what the death of one costs, and what is counted over both."""

from __future__ import annotations

import json
import os
import signal
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from support.asking import CONNECTION_LOST, Ask, answers, answers_while, assert_right, random_asks
from support.cluster import PATIENCE_S, Cluster, has_ended, running, until
from support.cluster_config import cluster_config, d, fake_engine, p


def workers(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {worker["name"]: worker for worker in cluster.status()["http_workers"]}


@pytest.mark.fault("F13")
def test_two_workers_serve_and_may_die(model: Path) -> None:
    config = cluster_config(model, p(), d(), engine=fake_engine(step_s=0.01), router={"workers": 2})
    asks = [Ask(ask.prompt, 60, ask.temperature, ask.seed) for ask in random_asks(81, 48)]
    with running(config) as cluster:
        before = workers(cluster)
        num_lost = 0

        def kill_one() -> None:
            nonlocal num_lost
            busy = until("both have requests", lambda: _both_busy(cluster))
            os.kill(busy["router-0"]["pid"], signal.SIGKILL)

        given = answers_while(cluster, asks, kill_one, limit=16, first=4)
        num_lost = sum(answer.end == CONNECTION_LOST for answer in given)
        assert 1 <= num_lost < 16
        assert assert_right(cluster, asks, given, CONNECTION_LOST) == len(asks) - num_lost
        until("another worker runs", lambda: len(workers(cluster)) == 2)
        after = workers(cluster)
        assert after["router-0"]["pid"] != before["router-0"]["pid"]
        assert after["router-1"]["pid"] == before["router-1"]["pid"]
        cluster.wait_until_quiescent()
        requests = cluster.status()["requests"]
        assert requests["aborted"] <= num_lost  # some had no request yet
        assert requests["failed"] == requests["refused"] == 0

        answered = cluster.metrics()["kvrelay_requests_total"]
        assert assert_right(cluster, asks, answers(cluster, asks)) == len(asks)
        # A worker that is late is left out of a scrape.
        until("all are counted", lambda: cluster.metrics()["kvrelay_requests_total"] == answered + len(asks))
        _router_dies(cluster, asks[0])


def _both_busy(cluster: Cluster) -> dict[str, dict[str, Any]] | None:
    found = workers(cluster)
    return found if all(worker["num_requests"] for worker in found.values()) else None


def _router_dies(cluster: Cluster, ask: Ask) -> None:
    """Its workers end with it, and connections wait for those of the next."""
    pids = [cluster.pid("router"), *(worker["pid"] for worker in workers(cluster).values())]
    os.kill(pids[0], signal.SIGKILL)
    until("the router and its workers have ended", lambda: all(map(has_ended, pids)))
    waiting = HTTPConnection(cluster.config.router.host, cluster.config.router.port, timeout=PATIENCE_S)
    waiting.request("POST", "/v1/completions", json.dumps(ask.body), {"content-type": "application/json"})
    answer = waiting.getresponse()
    choice = json.loads(answer.read())["choices"][0]
    assert (answer.status, choice["token_ids"]) == (200, ask.expected(cluster.fake()))
    waiting.close()
    cluster.wait_until_up()
