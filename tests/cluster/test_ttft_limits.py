"""Routing by predicted times to first token, on a 2P2D cluster: right tokens, and limits that nobody can meet."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.asking import Answer, Ask, Asker, answers, assert_right, play, random_asks, random_prompt
from support.cluster import Cluster, running, until
from support.cluster_config import cluster_config, d, fake_engine, p

HEADER = "x-llm-d-slo-ttft-ms"


@pytest.fixture(scope="module")
def by_ttft(model: Path) -> Iterator[Cluster]:
    """2P2D that routes by predicted times to first token."""
    config = cluster_config(
        model,
        *(p(f"p{index}") for index in range(2)),
        *(d(f"d{index}") for index in range(2)),
        cache={"num_blocks": 1024},
        router={"prefill_routing": "ttft", "decode_routing": "ttft"},
        engine=fake_engine(step_s=0.002),
    )
    with running(config) as cluster:
        yield cluster


def test_a_limit_that_no_node_can_meet_is_429_before_one_hears_of_it(by_ttft: Cluster) -> None:
    asks = random_asks(40, 60, longest=120, shared=random_prompt(random.Random(40), 64))

    assert assert_right(by_ttft, asks, answers(by_ttft, asks)) == len(asks)
    until("both prefill nodes tell their speed", lambda: all(speeds(by_ttft, "p0", "p1")))
    by_ttft.wait_until_quiescent()
    before, done = by_ttft.status()["requests"], work(by_ttft)
    assert all(num_steps for num_steps, _ in done.values())

    late = [Ask(random_prompt(random.Random(seed), 100), 4) for seed in range(8)]
    refused = asked_with_limit(by_ttft, late, "0.001")

    assert {(answer.end, answer.body["error"]["param"]) for answer in refused} == {
        ((429, "ttft_limit_exceeded"), HEADER)
    }
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    by_ttft.wait_until_quiescent()  # by reports from now on: nodes would have told of what they heard
    assert work(by_ttft) == done
    after = by_ttft.status()["requests"]
    assert after["attempts"] == before["attempts"]
    assert after["refused_for_ttft"] == before["refused_for_ttft"] + len(late)

    served = asked_with_limit(by_ttft, late, "60000")
    assert assert_right(by_ttft, late, served) == len(late)


def work(cluster: Cluster) -> dict[str, list[float]]:
    """Return how many steps each node has run and how many prompt tokens they computed."""
    names = ("steps", "prefill_tokens")
    return {node: [load["counters"][name] for name in names] for node, load in cluster.loads().items()}


def speeds(cluster: Cluster, *names: str) -> list[float]:
    """Return how many prompt tokens per second each of these nodes has measured."""
    loads = cluster.loads()
    return [loads[name]["prefill_tokens_per_s"] for name in names]


def asked_with_limit(cluster: Cluster, asks: list[Ask], limit_ms: str) -> list[Answer]:
    """Return the answers to ``asks``, each with a limit of its time to first token."""

    async def ask_all(asker: Asker) -> list[Answer]:
        return await asyncio.gather(*(asker.ask(ask, **{HEADER: limit_ms}) for ask in asks))

    return play(cluster, ask_all)
