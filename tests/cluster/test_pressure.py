"""Pools that are too small, and peers that stand still: work waits, and comes out right."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.asking import Ask, answers, answers_while, assert_right, random_asks, random_prompt
from support.cluster import Cluster, running, until
from support.cluster_config import cluster_config, d, fake_engine, p

POOL = 24
"""Blocks of each node: room for three requests of this module at most."""


@pytest.fixture(scope="module")
def tight(model: Path) -> Iterator[Cluster]:
    """1P1D that admits whatever fits now, and so must preempt when it grows; peers are given all the time they need."""
    config = cluster_config(
        model,
        p(),
        d(),
        cache={"num_blocks": POOL},
        scheduler={"reserve_policy": "none", "watermark": 0.0},
        transfer={"link": "tcp", "max_inflight_bytes": 1 << 16},
        cluster={"peer_timeout_s": 60.0},
        engine=fake_engine(step_s=0.002, num_kv_heads=8, head_dim=64),
    )
    with running(config) as cluster:
        yield cluster


@pytest.mark.fault("F10", "F11")
def test_preempted_requests_go_on_as_if_nothing_had_happened(tight: Cluster) -> None:
    rng = random.Random(30)
    asks = [
        Ask(random_prompt(rng, rng.randint(1, 80)), 120, temperature=0.9 if seed % 2 else 0.0, seed=seed)
        for seed in range(24)
    ]

    given = answers(tight, asks, limit=12)
    tight.wait_until_quiescent()

    assert assert_right(tight, asks, given) == len(asks)
    assert tight.metrics()["kvrelay_node_preemptions_total"] > 0
    assert tight.counters()["preemptions"] > 0


@pytest.mark.fault("F09")
def test_decode_node_stands_still_until_everything_is_full(tight: Cluster) -> None:
    asks = random_asks(31, 60, longest=150, max_tokens=20)
    still = [tight.pid("d0"), tight.messager_pid("d0")]

    def stop_until_full() -> None:
        with stopped(still):
            until("the prefill node's pool is full", lambda: tight.loads()["p0"]["num_waiting"] > 0)
            heartbeats = tight.node("p0")["num_heartbeats"]
            until("the prefill node lives on", lambda: tight.node("p0")["num_heartbeats"] > heartbeats + 3)
            assert tight.http.get("/health").status_code == 200

    given = answers_while(tight, asks, stop_until_full, limit=60, first=3)
    tight.wait_until_quiescent()

    assert assert_right(tight, asks, given) == len(asks)


@pytest.mark.fault("F03")
def test_a_request_larger_than_the_pool_is_refused_for_good(tight: Cluster) -> None:
    too_long, good = Ask([9] * (POOL * 16 + 1), 4), Ask([9] * 100, 4)

    refused, served = answers(tight, [too_long, good])

    assert refused.end == (400, "kv_cache_too_small")
    assert assert_right(tight, [good], [served]) == 1
    tight.wait_until_quiescent()


def test_a_request_that_outgrows_the_pool_ends_with_an_error(tight: Cluster) -> None:
    outgrowing, good = Ask([10] * 100, POOL * 16), Ask([10] * 100, 4)

    failed, served = answers(tight, [outgrowing, good], limit=1)

    assert failed.end == (400, "kv_cache_too_small")
    assert assert_right(tight, [good], [served]) == 1
    tight.wait_until_quiescent()


@pytest.mark.fault("F09")
def test_decode_node_stands_still_for_so_long_that_it_is_given_up(model: Path) -> None:
    """Its requests go on elsewhere; back again, it holds nothing of them and serves."""
    config = cluster_config(
        model, p(), d("d0"), d("d1"), cluster={"peer_timeout_s": 2.0}, engine=fake_engine(step_s=0.005)
    )
    asks = random_asks(32, 60, max_tokens=60)

    with running(config) as cluster:
        still = [cluster.pid("d0"), cluster.messager_pid("d0")]

        def stop_until_lost() -> None:
            with stopped(still):
                until("d0 is given up", lambda: "d0" not in cluster.incarnations())

        incarnation = cluster.incarnations()["d0"]
        given = answers_while(cluster, asks, stop_until_lost, limit=20, first=10)
        until("d0 is there again", lambda: cluster.incarnations().get("d0") == incarnation)
        cluster.wait_until_quiescent()

        assert assert_right(cluster, asks, given) == len(asks)
        assert cluster.status()["requests"]["retries"] > 0
        again = random_asks(33, 20)
        assert assert_right(cluster, again, answers(cluster, again)) == len(again)


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
