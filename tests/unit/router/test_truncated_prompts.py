"""``truncate_prompt_tokens``: the last tokens of a prompt are used."""

from __future__ import annotations

from typing import Any

import pytest
from instant_router import InstantRouter

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompt", "count", "kept"),
    [
        ([5, 6, 7, 8], 2, [7, 8]),
        ([5, 6, 7, 8], 9, [5, 6, 7, 8]),
        ([5, 6, 7, 8], -1, [5, 6, 7, 8]),
        (list(range(600)), -1, list(range(600))[-511:]),
        (list(range(600)), 512, list(range(600))[-512:]),
    ],
)
def test_the_last_tokens_are_kept(prompt: list[int], count: int, kept: list[int]) -> None:
    router = InstantRouter()
    max_tokens = 0 if len(kept) == 512 else 1
    body = {"prompt": prompt, "truncate_prompt_tokens": count, "max_tokens": max_tokens, "prompt_logprobs": 0}
    answer = router.answer(COMPLETIONS, body)
    assert router.last.prompt_token_ids == kept
    assert answer["usage"]["prompt_tokens"] == len(kept)


def test_texts_of_any_length_are_cut() -> None:
    router = InstantRouter()
    router.answer(COMPLETIONS, {"prompt": "word " * 20_000 + "end", "truncate_prompt_tokens": 3, "max_tokens": 1})
    whole = router.answer("/tokenize", {"prompt": " word end", "add_special_tokens": False})["tokens"]
    assert router.last.prompt_token_ids == whole[-3:]
    router.answer(CHAT, {"messages": HI, "truncate_prompt_tokens": 4, "max_tokens": 1})
    assert len(router.last.prompt_token_ids) == 4


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "1 or more"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "-1 or more"),
        ({"truncate_prompt_tokens": 513}, "truncate_prompt_tokens", "more than max_model_len, which is 512"),
        ({"truncate_prompt_tokens": 3, "echo": True}, "echo", "not together with truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 512}, "prompt", "528 tokens"),
    ],
)
def test_wrong_values(body: dict[str, Any], param: str, said: str) -> None:
    response = InstantRouter().post(COMPLETIONS, {"prompt": [65] * 600, **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert said in error["message"]
