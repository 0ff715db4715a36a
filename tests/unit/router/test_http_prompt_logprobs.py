"""Logprobs of prompts over HTTP: ``echo`` with ``logprobs``, and vLLM's ``prompt_logprobs``."""

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any

import pytest
from instant_router import InstantRouter

from router.openai import prompt_logprobs

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def streamed(router: InstantRouter, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of all chunks."""
    response = router.post(COMPLETIONS, {**body, "stream": True})
    assert response.status_code == 200, response.text
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    return [choice for chunk in chunks for choice in chunk["choices"]]


ECHO = {"prompt": "wxyz?", "max_tokens": 2, "echo": True, "logprobs": 1}
ECHOED = {
    "text_offset": [0, 1, 2, 3, 4, 5, 6],
    "token_logprobs": [None, -0.5, -1.0, -1.5, -2.0, -0.5, -0.5],
    "tokens": ["w", "x", "y", "z", "?", "b", "c"],
    "top_logprobs": [
        None,
        {"!": -0.5, "x": -0.5},
        {"!": -1.0, "y": -1.0},
        {"!": -1.5, "z": -1.5},
        {"!": -2.0, "?": -2.0},
        {"!": -1.0, "b": -0.5},
        {"!": -1.0, "c": -0.5},
    ],
}


def test_echo_with_logprobs() -> None:
    router = InstantRouter()
    [choice] = router.answer(COMPLETIONS, ECHO)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("wxyz?bc", ECHOED)
    assert "prompt_logprobs" not in choice
    assert router.last.sampling.num_prompt_logprobs == 1


def test_streams_have_the_same_in_parts() -> None:
    parts = streamed(InstantRouter(), ECHO)
    assert [part["text"] for part in parts] == ["wxyz?", "", "b", "c"]
    joined = {name: [item for part in parts for item in part["logprobs"][name]] for name in ECHOED}
    assert joined == ECHOED
    assert [part["finish_reason"] for part in parts] == [None, None, None, "length"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["wxyz?", [86], [86] * 512])
def test_max_tokens_0_gives_the_logprobs_of_the_prompt_alone(prompt: Any, stream: bool) -> None:
    router, body = InstantRouter(), {**ECHO, "prompt": prompt, "max_tokens": 0}
    choices = streamed(router, body) if stream else router.answer(COMPLETIONS, body)["choices"]
    found = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    assert found == [None, *(-position / 2 for position in range(1, len(prompt)))]
    assert "".join(choice["text"] for choice in choices) == (prompt if isinstance(prompt, str) else "w" * len(prompt))
    assert choices[-1]["finish_reason"] == "length"
    assert router.last.sampling.max_tokens == 0


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompts_are_counted_once(max_tokens: int) -> None:
    router = InstantRouter()
    router.answer(COMPLETIONS, {**ECHO, "max_tokens": max_tokens})
    assert (router.metrics.prompt_tokens, router.metrics.output_tokens) == (5, max_tokens)


def test_prompts_that_nobody_computes_are_not_counted() -> None:
    router = InstantRouter()
    router.answer(COMPLETIONS, {**ECHO, "max_tokens": 0, "logprobs": None})
    assert router.metrics.prompt_tokens == 0


def test_echo_without_logprobs_computes_none() -> None:
    router = InstantRouter()
    router.answer(COMPLETIONS, {**ECHO, "logprobs": None})
    router.answer(COMPLETIONS, {**ECHO, "echo": False})
    assert all(request.sampling.num_prompt_logprobs is None for request in router.service.submitted)


def test_prompt_logprobs_of_completions() -> None:
    router = InstantRouter()
    answer = router.answer(COMPLETIONS, {"prompt": ["xyz", "!"], "max_tokens": 1, "prompt_logprobs": 1, "n": 2})
    first = [
        None,
        {
            "88": {"logprob": -0.5, "rank": 11, "decoded_token": "y"},
            "0": {"logprob": -0.5, "rank": 1, "decoded_token": "!"},
        },
        {
            "89": {"logprob": -1.0, "rank": 12, "decoded_token": "z"},
            "0": {"logprob": -1.0, "rank": 1, "decoded_token": "!"},
        },
    ]
    assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [first, first, [None], [None]]
    assert all(choice["logprobs"] is None for choice in answer["choices"])


def test_prompt_logprobs_of_chats() -> None:
    router = InstantRouter()
    answer = router.answer(CHAT, {"messages": HI, "max_tokens": 2, "prompt_logprobs": 0, "logprobs": True, "n": 2})
    items = answer["prompt_logprobs"]
    prompt = router.last.prompt_token_ids
    assert items[0] is None and len(items) == len(prompt)
    assert [next(iter(item)) for item in items[1:]] == [str(token) for token in prompt[1:]]
    assert all(len(item) == 1 for item in items[1:])
    assert [len(choice["logprobs"]["content"]) for choice in answer["choices"]] == [2, 2]
    assert "prompt_logprobs" not in answer["choices"][0]


def test_both_at_once_have_their_own_numbers_of_alternatives() -> None:
    router = InstantRouter()
    [choice] = router.answer(COMPLETIONS, {**ECHO, "prompt_logprobs": 3})["choices"]
    assert router.last.sampling.num_prompt_logprobs == 3
    assert choice["logprobs"] == ECHOED
    assert [len(item) for item in choice["prompt_logprobs"][1:]] == [4] * 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt_logprobs": 3}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 3}, "logprobs"),
        ({"prompt_logprobs": 1, "n": 2}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "prompt": ["abcde", "abcdef"]}, "prompt_logprobs"),
    ],
)
def test_too_many_are_refused(monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], param: str) -> None:
    monkeypatch.setattr(prompt_logprobs, "MAX_PROMPT_LOGPROBS", 20)
    router = InstantRouter()
    response = router.post(COMPLETIONS, {"prompt": "abcdef", **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert "the limit of one request is 20" in error["message"]
    assert not router.service.submitted
    fewer = {**body, "prompt": "abcd", "n": 1} if "prompt" not in body else {**body, "prompt": ["abcde"] * 2}
    assert router.post(COMPLETIONS, fewer).status_code == 200


# ---------------------------------------------------------------- lm-eval


def lm_eval_body(prompt: object) -> dict[str, Any]:
    """Return the body that lm-eval's ``local-completions`` sends for log likelihoods, of any kind of task."""
    return {
        "model": "demo",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def likelihoods(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """Read an answer as lm-eval does: all but the generated token count, from the end of the context on."""
    found = []
    for choice, length in zip(sorted(answer["choices"], key=itemgetter("index")), context_lengths, strict=True):
        values = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        found.append((sum(values), greedy))
    return found


@pytest.mark.parametrize("prompts", [[[65, 66, 67, 68, 69], [70, 71]], ["ABCDE", "FG"]])
def test_lm_eval_s_batches(prompts: list[Any]) -> None:
    answer = InstantRouter().answer(COMPLETIONS, lm_eval_body(prompts))
    assert likelihoods(answer, [3, 1]) == [(-1.5 - 2.0, True), (-0.5, True)]


def test_lm_eval_s_single_text() -> None:
    answer = InstantRouter().answer(COMPLETIONS, lm_eval_body("ABCDE"))
    assert likelihoods(answer, [1]) == [(-0.5 - 1.0 - 1.5 - 2.0, True)]
