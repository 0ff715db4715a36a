"""Unusual requests get the answer of a single mixed node, field by field: text, tokens, logprobs, reasons and usage."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.asking import Asker, play, random_prompt
from support.cluster import Cluster

pytestmark = [pytest.mark.timeout(300), pytest.mark.parametrize("real_cluster", ["qwen2"], indirect=True)]

BLOCK = 16
TEXT = "The quick brown fox jumps over the lazy dog, and then"


def bodies() -> dict[str, dict[str, Any]]:
    """Return the requests by what is unusual about them."""
    rng = random.Random(17)
    three_blocks = random_prompt(rng, 3 * BLOCK)
    return {
        "one token": {"prompt": TEXT, "max_tokens": 1, "logprobs": 2},
        "no token": {"prompt": TEXT, "max_tokens": 0, "echo": True},
        "echo": {"prompt": TEXT, "max_tokens": 12, "echo": True},
        "echo of ids": {"prompt": three_blocks, "max_tokens": 4, "echo": True},
        "ignore_eos": {"prompt": TEXT, "max_tokens": 40, "ignore_eos": True},
        "min_tokens": {"prompt": TEXT, "max_tokens": 20, "min_tokens": 10},
        "one token of prompt": {"prompt": three_blocks[:1], "max_tokens": 8, "logprobs": 1},
        "less than a block": {"prompt": random_prompt(rng, BLOCK - 1), "max_tokens": 8, "logprobs": 1},
        "three blocks": {"prompt": three_blocks, "max_tokens": 8, "logprobs": 1},
        "three blocks again": {"prompt": three_blocks, "max_tokens": 8, "logprobs": 1},
        "three blocks and one token": {"prompt": [*three_blocks, 7], "max_tokens": 8, "logprobs": 1},
        "several choices": {"prompt": [TEXT, TEXT[4:]], "n": 2, "max_tokens": 6, "seed": 3, "temperature": 1.0},
        "penalties": {"prompt": TEXT, "max_tokens": 24, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    }


def compared(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer without what no two answers share, and without the hits of the prefix cache."""
    usage = {name: value for name, value in answer["usage"].items() if name != "prompt_tokens_details"}
    return {**{name: value for name, value in answer.items() if name not in ("id", "created")}, "usage": usage}


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compare two JSON values. Batches differ in the last bits of their logits."""
    if isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=0, abs=1e-4)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_equal(ours[name], value)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == theirs


def answer(cluster: Cluster, body: dict[str, Any]) -> dict[str, Any]:
    async def scenario(asker: Asker) -> dict[str, Any]:
        given = await asker.post(
            "/v1/completions", {"model": "demo", "temperature": 0.0, "return_token_ids": True, **body}
        )
        assert given.status == 200, given.body
        return given.body

    return play(cluster, scenario)


@pytest.mark.fault("F17")
def test_edge_requests(real_cluster: Cluster, mixed_node: Cluster) -> None:
    for name, body in bodies().items():
        ours, theirs = answer(real_cluster, body), answer(mixed_node, body)
        try:
            assert_equal(compared(ours), compared(theirs))
        except AssertionError as error:
            error.add_note(name)
            raise


@pytest.mark.fault("F17")
def test_stop_strings_and_tokens(real_cluster: Cluster, mixed_node: Cluster) -> None:
    """At every place of the answer, the first token that P samples and the one after it included."""
    plain = {"prompt": TEXT, "max_tokens": 16, "ignore_eos": True}
    (choice,) = answer(mixed_node, plain)["choices"]
    ends: list[dict[str, Any]] = [{"stop_token_ids": [token_id]} for token_id in choice["token_ids"][:4]]
    text = choice["text"]
    ends += [{"stop": [text[place : place + 2]]} for place in range(0, min(len(text) - 2, 12), 2)]
    ends += [{"stop": [text[1:3]], "include_stop_str_in_output": True}]
    for end in ends:
        body = {**plain, **end}
        ours, theirs = answer(real_cluster, body), answer(mixed_node, body)
        assert theirs["choices"][0]["finish_reason"] == "stop"
        assert_equal(compared(ours), compared(theirs))
