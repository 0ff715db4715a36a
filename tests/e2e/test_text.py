"""Text in and text out: chat template, tokens to text, characters that take several tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.asking import Ask, Asker, play
from support.cluster import Cluster
from tokenizers import Tokenizer

pytestmark = [pytest.mark.timeout(300), pytest.mark.parametrize("real_cluster", ["qwen2"], indirect=True)]

EMOJI = "😀"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"grüße {EMOJI}"}]


def tokenizer(cluster: Cluster) -> Tokenizer:
    return Tokenizer.from_file(str(Path(cluster.config.model.path) / "tokenizer.json"))


def text_of(cluster: Cluster, token_ids: list[int]) -> str:
    text: str = tokenizer(cluster).decode(token_ids)
    return text


def test_chat_template_and_streamed_text(real_cluster: Cluster) -> None:
    body = {
        "model": "demo",
        "messages": MESSAGES,
        "max_tokens": 48,
        "temperature": 1.0,
        "seed": 5,
        "ignore_eos": True,
        "return_token_ids": True,
    }

    async def both(asker: Asker) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        whole = await asker.post("/v1/chat/completions", body)
        return whole.body, await asker.stream("/v1/chat/completions", body)

    whole, parts = play(real_cluster, both)

    rendered = f"<|begin|><|system|>be brief<|end|><|user|>grüße {EMOJI}<|end|><|assistant|>"
    assert whole["prompt_token_ids"] == tokenizer(real_cluster).encode(rendered).ids
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == text_of(real_cluster, choice["token_ids"])
    deltas = [part["choices"][0] for part in parts]
    assert [token_id for delta in deltas for token_id in delta["token_ids"]] == choice["token_ids"]
    assert "".join(delta["delta"]["content"] for delta in deltas) == choice["message"]["content"]
    assert "�" in choice["message"]["content"]  # bytes that are no characters are part of what random weights say


@pytest.mark.fault("F25")
def test_characters_that_take_several_tokens_come_whole(real_cluster: Cluster) -> None:
    token_ids = tokenizer(real_cluster).encode(EMOJI).ids
    assert len(token_ids) == len(EMOJI.encode())
    ask = Ask(
        [1],
        240,
        temperature=1.0,
        seed=11,
        more={"n": 8, "logit_bias": {str(token_id): 100 for token_id in token_ids}},
    )

    async def both(asker: Asker) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        whole = await asker.post("/v1/completions", ask.body)
        return whole.body, await asker.stream("/v1/completions", ask.body)

    whole, parts = play(real_cluster, both)

    texts = [""] * 8
    for part in parts:
        (delta,) = part["choices"]
        texts[delta["index"]] += delta["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert texts == [text_of(real_cluster, choice["token_ids"]) for choice in whole["choices"]]
    pieces = [part["choices"][0]["text"] for part in parts]
    assert any(EMOJI in piece for piece in pieces)
