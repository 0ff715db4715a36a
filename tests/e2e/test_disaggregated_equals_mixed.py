"""1P3D against one mixed node that serves the same checkpoint: same tokens, same logprobs, and no KV moved in vain."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.asking import Answer, Ask, answers, random_prompt
from support.cluster import Cluster

from kvrelay.protocol.geometry import KVGeometry

NUM_REQUESTS = 64
AT_ONCE = 16
LONGEST_PROMPT = 600
SHARED_PREFIX = 70

CLEAR_SEEDS = {
    5: 305,
    9: 309,
    21: 1021,
    29: 2429,
    37: 737,
    39: 1339,
    41: 1041,
    45: 145,
    47: 147,
    51: 5951,
    59: 159,
    61: 361,
    63: 1363,
}
"""Seeds of the requests whose own number would put a draw next to the boundary between two tokens.

Batches differ in the last bits of their logits, and with such a draw the token too. Now all are 3e-5 from any boundary.
"""


def random_requests() -> list[Ask]:
    """Return prompts of 1 to 600 tokens, one in four with the same beginning; half greedy, half sampled by a seed."""
    rng = random.Random(3)
    shared = random_prompt(rng, SHARED_PREFIX)
    asks = []
    for number in range(NUM_REQUESTS):
        prompt = random_prompt(rng, rng.randint(1, LONGEST_PROMPT))
        if number % 4 == 0:
            prompt = (shared + prompt)[:LONGEST_PROMPT]
        sampled = {"temperature": rng.choice([0.5, 1.0]), "seed": CLEAR_SEEDS.get(number, number)} if number % 2 else {}
        asks.append(Ask(prompt, rng.randint(2, 24), more={"logprobs": 2, **sampled}))
    return asks


def geometry(cluster: Cluster) -> KVGeometry:
    """Return the shape of the KV cache that the checkpoint's config makes it."""
    settings = json.loads((Path(cluster.config.model.path) / "config.json").read_text())
    return KVGeometry(
        num_layers=settings["num_hidden_layers"],
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        block_size=cluster.config.cache.block_size,
        dtype="float32",
        model_digest="",
    )


def logprobs(answer: Answer) -> dict[str, Any]:
    (choice,) = answer.body["choices"]
    found: dict[str, Any] = choice["logprobs"]
    return found


@pytest.mark.fault("F17")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("real_cluster", ["qwen2"], indirect=True)
def test_random_requests(real_cluster: Cluster, mixed_node: Cluster) -> None:
    asks = random_requests()
    moved_before, hit_before = kv_bytes_moved(real_cluster), decode_hit_tokens(real_cluster)

    given = answers(real_cluster, asks, limit=AT_ONCE)
    alone = answers(mixed_node, asks, limit=AT_ONCE)
    real_cluster.wait_until_quiescent()

    assert [answer.token_ids for answer in given] == [answer.token_ids for answer in alone]
    for ours, theirs in zip(map(logprobs, given), map(logprobs, alone), strict=True):
        np.testing.assert_allclose(ours["token_logprobs"], theirs["token_logprobs"], rtol=0, atol=1e-4)
        for top, reference in zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True):
            assert top == pytest.approx(reference, rel=0, abs=1e-4)
    shape = geometry(real_cluster)
    hit_tokens = decode_hit_tokens(real_cluster) - hit_before
    sent_blocks = sum(shape.blocks_for(len(ask.prompt)) for ask in asks) - hit_tokens // shape.block_size
    assert hit_tokens > 0
    assert kv_bytes_moved(real_cluster) - moved_before == sent_blocks * shape.block_bytes


def kv_bytes_moved(cluster: Cluster) -> float:
    """Return what the router has counted, having checked that both ends of the transfers say the same."""
    moved: float = cluster.status()["requests"]["kv_bytes_moved"]
    counters = cluster.counters()
    assert counters["kv_bytes_sent"] == counters["kv_bytes_received"] == moved
    return moved


def decode_hit_tokens(cluster: Cluster) -> float:
    decode_nodes = [node for node in cluster.status()["nodes"] if node["role"] == "decode"]
    return float(sum(node["load"]["counters"]["prefix_hit_tokens"] for node in decode_nodes))
