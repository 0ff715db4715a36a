"""Logprobs of prompts over HTTP with a real model: the same bits on a mixed node and from P to D, cached or not."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.asking import Asker, play
from support.cluster import Cluster, running
from support.cluster_config import VOCAB_SIZE, cluster_config, d, m, p
from support.cluster_fixtures import WriteCheckpoint

FLOAT32: dict[str, Any] = {"model": {"dtype": "float32"}, "cache": {"num_blocks": 512}}
CLUSTERS: dict[str, tuple[dict[str, Any], ...]] = {
    "mixed": (m(),),
    "1p1d": (p(scheduler={"max_num_batched_tokens": 24}), d()),
}

pytestmark = pytest.mark.timeout(300)


def bodies() -> list[tuple[str, dict[str, Any]]]:
    rng = random.Random(5)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (2, 16, 17, 33, 100)]
    echo = {"echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
    messages = [{"role": "user", "content": "The red key lies in box 417."}]
    return [
        ("/v1/completions", {"prompt": prompts, "max_tokens": 1, **echo}),  # as lm-eval asks
        ("/v1/completions", {"prompt": prompts[-1], "max_tokens": 0, **echo, "logprobs": 5}),
        ("/v1/completions", {"prompt": "The red key", "max_tokens": 4, "prompt_logprobs": 20, "seed": 2}),
        ("/v1/completions", {"prompt": [5], "max_tokens": 4, "prompt_logprobs": 1, "seed": 2}),
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 4, "prompt_logprobs": 0, "seed": 2}),
        ("/v1/completions", {"prompt": prompts[-1][:99], "max_tokens": 0, **echo}),
    ]


def ask(cluster: Cluster) -> list[tuple[Any, Any]]:
    """Ask everything twice, so that the second time all prompts are cached; return the answers without their names."""

    async def all_of_them(asker: Asker) -> list[dict[str, Any]]:
        return [(await asker.post(path, body)).body for _ in range(2) for path, body in bodies()]

    found = [(answer.get("prompt_logprobs"), answer["choices"]) for answer in play(cluster, all_of_them)]
    half = len(found) // 2
    assert found[:half] == found[half:]
    return found[:half]


def test_the_same_bits_everywhere(checkpoint: WriteCheckpoint) -> None:
    found = []
    for nodes in CLUSTERS.values():
        with running(cluster_config(checkpoint("qwen3"), *nodes, **FLOAT32)) as cluster:
            found.append(ask(cluster))
            cluster.wait_until_quiescent()
    assert found[0] == found[1]
    [(_, choices), (_, [echoed]), (_, [wide]), (_, [single]), (of_chat, _), _] = found[0]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [3, 17, 18, 34, 101]
    assert [value is None for value in echoed["logprobs"]["token_logprobs"]] == [True] + [False] * 99
    assert echoed["logprobs"]["token_logprobs"] == choices[-1]["logprobs"]["token_logprobs"][:-1]
    assert all(len(item) in (20, 21) for item in wide["prompt_logprobs"][1:])
    assert single["prompt_logprobs"] == [None]
    assert of_chat[0] is None and all(len(item) == 1 for item in of_chat[1:])
