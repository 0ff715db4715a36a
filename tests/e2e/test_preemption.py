"""1P3D with a real checkpoint and pools so small that every decode node preempts: as one node with room for all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import starmap

import pytest
from support.asking import Ask, answers, random_prompt
from support.cluster import Cluster, running
from support.cluster_config import cluster_config, d, p
from support.cluster_fixtures import WriteCheckpoint

DECODE_NODES = ("d0", "d1", "d2")
POOL = 16
"""Blocks of each decode node: room for any request of this module alone, and for no three of them together."""

NEAR_TIES = {7, 19, 23, 25}
"""Seeds with a draw within 5e-6 of the boundary between two tokens: there rounding may decide, and batches differ."""


@pytest.fixture(scope="module")
def tight(checkpoint: WriteCheckpoint) -> Iterator[Cluster]:
    """Decode nodes that admit whatever fits now, and so must preempt when it grows."""
    nodes = [p(cache={"num_blocks": 1024}), *(d(name, cache={"num_blocks": POOL}) for name in DECODE_NODES)]
    config = cluster_config(
        checkpoint("qwen2"),
        *nodes,
        router={"decode_routing": "round_robin"},
        scheduler={"reserve_policy": "none", "watermark": 0.0},
    )
    with running(config) as cluster:
        yield cluster


def asked(number: int, length: int) -> Ask:
    sampled = {"temperature": 0.8, "seed": number} if number % 2 and number not in NEAR_TIES else {}
    prompt = random_prompt(random.Random(number), length)
    return Ask(prompt, 110, more={"logprobs": 1, "frequency_penalty": 0.2 * (number % 3), **sampled})


@pytest.mark.fault("F10")
@pytest.mark.timeout(300)
def test_preempted_requests_give_the_tokens_of_undisturbed_ones(tight: Cluster, mixed_node: Cluster) -> None:
    asks = list(starmap(asked, enumerate([20, 33, 48, 5, 64, 17] * 5)))
    given = answers(tight, asks, limit=15)
    tight.wait_until_quiescent()
    alone = answers(mixed_node, asks, limit=15)
    assert [answer.token_ids for answer in given] == [answer.token_ids for answer in alone]
    preemptions = {name: tight.loads()[name]["counters"]["preemptions"] for name in DECODE_NODES}
    assert all(preemptions.values()), preemptions
    assert mixed_node.counters()["preemptions"] == 0
