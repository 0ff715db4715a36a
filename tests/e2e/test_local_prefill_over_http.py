"""1P1D with a real checkpoint, where D computes prompts too: the tokens of clusters that never do, and of one node."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from support.asking import Ask, answers, random_prompt
from support.cluster import Cluster, running, until
from support.cluster_config import cluster_config, d, p
from support.cluster_fixtures import WriteCheckpoint

BLOCK_SIZE = 16
LENGTHS = (120, 301, 7, 64, 210, 33, 150, 90)
ANSWER_LEN = 24


@pytest.fixture(scope="module")
def lending(checkpoint: WriteCheckpoint) -> Iterator[Cluster]:
    """D gets every other prompt, and computes it in small chunks beside its decodes."""
    nodes = [p(), d(scheduler={"max_num_batched_tokens": 64, "max_num_seqs": 32})]
    router = {"local_prefill_tokens": 0}
    with running(cluster_config(checkpoint("qwen2"), *nodes, cache={"num_blocks": 1024}, router=router)) as cluster:
        until("d0 has told of its room", lambda: cluster.node("d0")["num_heartbeats"])
        yield cluster


def batch(cluster: Cluster, **sampling: Any) -> list[list[int]]:
    """Return the answers to prompts that come all in one HTTP request, and so to the router at once."""
    rng = random.Random(11)
    prompts: Any = [random_prompt(rng, length) for length in LENGTHS]
    [answer] = answers(cluster, [Ask(prompts, ANSWER_LEN, **sampling)])
    assert answer.status == 200, answer.body
    choices = sorted(answer.body["choices"], key=lambda choice: choice["index"])
    return [choice["token_ids"] for choice in choices]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("real_cluster", ["qwen2"], indirect=True)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "seeded"])
def test_a_burst_gives_the_same_tokens(
    sampling: dict[str, Any], lending: Cluster, real_cluster: Cluster, mixed_node: Cluster
) -> None:
    before = lending.status()["requests"]["local_prefills"]
    given = batch(lending, **sampling)
    lending.wait_until_quiescent()
    assert given == batch(real_cluster, **sampling) == batch(mixed_node, **sampling)
    assert [len(token_ids) for token_ids in given] == [ANSWER_LEN] * len(LENGTHS)
    num_local = lending.status()["requests"]["local_prefills"] - before
    assert 0 < num_local < len(LENGTHS)
    assert lending.metrics()["kvrelay_router_local_prefills_total"] == before + num_local
    assert real_cluster.status()["requests"]["local_prefills"] == 0


def test_the_second_turn_finds_the_first_on_the_decode_node(lending: Cluster) -> None:
    lending.wait_until_quiescent()
    moved = lending.status()["requests"]["kv_bytes_moved"]
    first_prompt = random_prompt(random.Random(12), 100)
    [first] = answers(lending, [Ask(first_prompt, ANSWER_LEN)])
    lending.wait_until_quiescent()
    more = random_prompt(random.Random(13), 30)
    [second] = answers(lending, [Ask([*first_prompt, *first.token_ids, *more], ANSWER_LEN)])
    lending.wait_until_quiescent()

    num_known = (100 + ANSWER_LEN - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert second.body["usage"]["prompt_tokens_details"]["cached_tokens"] == num_known
    assert lending.status()["requests"]["kv_bytes_moved"] == moved
    timeline = lending.http.get(f"/cluster/requests/{second.body['id']}").json()
    marks = [(mark["name"], mark["node"]) for mark in timeline["marks"]]
    assert {("local_prefill", "router"), ("prefill", "d0"), ("decode", "d0")} <= set(marks)
    assert timeline["layers"] == []
