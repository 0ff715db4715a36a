"""Every architecture from 1P3D, over HTTP, against what Hugging Face transformers gives for the same weights."""

from __future__ import annotations

import pytest
from golden.cases import CASES, NUM_OUTPUT_TOKENS, PROMPT_LENGTHS, load_golden
from support.asking import Ask, answers
from support.cluster import Cluster


@pytest.mark.parametrize("real_cluster", ["qwen2", "qwen3", "llama", "mistral", "ernie4_5"], indirect=True)
def test_greedy_tokens_are_those_of_transformers(real_cluster: Cluster, request: pytest.FixtureRequest) -> None:
    arch = request.node.callspec.params["real_cluster"]
    golden = list(load_golden(next(case for case in CASES if case.name == arch)))

    given = answers(real_cluster, [Ask(one.prompt_token_ids, NUM_OUTPUT_TOKENS) for one in golden])

    assert [len(one.prompt_token_ids) for one in golden] == list(PROMPT_LENGTHS)
    assert [answer.token_ids for answer in given] == [one.output_token_ids for one in golden]
    assert {node["role"] for node in real_cluster.status()["nodes"]} == {"prefill", "decode"}
