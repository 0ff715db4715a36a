"""What clients of OpenAI and vLLM send and expect, and other servers have been strict about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_nodes import config
from instant_router import InstantRouter

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.engine.tiny import write_tiny_checkpoint
from router.openai.models import model_name

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]

# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("asked", [512, 10**6, 2**63 - 1])
def test_more_tokens_than_there_is_room_for_are_as_many_as_there_is_room_for(asked: int) -> None:
    router = InstantRouter()
    router.answer(COMPLETIONS, {"prompt": "abc", "max_tokens": asked})
    assert router.last.sampling.max_tokens == 512 - 3
    for name in ("max_tokens", "max_completion_tokens"):
        router.answer(CHAT, {"messages": HI, name: asked})
        assert router.last.sampling.max_tokens == 512 - len("user: hi\nassistant: ")


def test_max_completion_tokens_goes_before_max_tokens() -> None:
    router = InstantRouter()
    router.answer(CHAT, {"messages": HI, "max_tokens": 3, "max_completion_tokens": 2})
    assert router.last.sampling.max_tokens == 2


def test_min_tokens_is_held_against_what_there_is_room_for() -> None:
    router = InstantRouter()
    response = router.post(COMPLETIONS, {"prompt": [65] * 500, "max_tokens": 50, "min_tokens": 20})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "min_tokens: 20 is more than may be generated, which is 12"


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        (
            COMPLETIONS,
            {"prompt": [65] * 600, "max_tokens": 20},
            "prompt",
            "620 tokens (600 in the prompt, 20 in the completion). Please reduce the length of the prompt or",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x" * 600}]},
            "messages",
            "619 tokens (618 in the messages, 1 in the completion). Please reduce the length of the messages or",
        ),
        (COMPLETIONS, {"prompt": [65] * 512, "max_tokens": 1}, "prompt", "513 tokens (512 in the prompt, 1 in the"),
        (COMPLETIONS, {"prompt": [65] * 513, "max_tokens": 0}, "prompt", "(513 in the prompt, 1 in the"),
    ],
)
def test_too_long_prompt_is_told_in_the_words_client_libraries_know(
    path: str, body: dict[str, Any], param: str, said: str
) -> None:
    response = InstantRouter().post(path, body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == param
    assert error["message"].startswith("This model's maximum context length is 512 tokens. However, you requested ")
    assert said in error["message"]
    assert error["message"].endswith("or completion.")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("echo", "text"), [(True, "Hé"), (False, ""), (None, "")])
def test_max_tokens_0_gives_the_prompt_alone(echo: bool | None, text: str, streaming: bool) -> None:
    router = InstantRouter()
    body = {"prompt": ["Hé"] * 2, "max_tokens": 0, "echo": echo, "stream": streaming}
    response = router.post(COMPLETIONS, body)
    assert response.status_code == 200
    assert not router.service.submitted
    if streaming:
        chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
    else:
        choices = response.json()["choices"]
        assert response.json()["usage"]["completion_tokens"] == 0
        assert response.json()["usage"]["prompt_tokens"] == 2 * len("Hé".encode())
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in choices] == [
        (0, text, "length"),
        (1, text, "length"),
    ]


def test_max_tokens_0_takes_a_prompt_as_long_as_the_model() -> None:
    answer = InstantRouter().answer(COMPLETIONS, {"prompt": [65] * 512, "max_tokens": 0, "echo": True})
    assert len(answer["choices"][0]["text"]) == 512


@pytest.mark.parametrize("zero", [0, 0.0])
def test_top_p_0_is_greedy(zero: float) -> None:
    router = InstantRouter()
    router.answer(COMPLETIONS, {"prompt": "a", "top_p": zero, "temperature": 1.5})
    assert (router.last.sampling.top_p, router.last.sampling.temperature) == (1.0, 0.0)
    router.answer(COMPLETIONS, {"prompt": "a", "top_p": 0.25, "temperature": 1.5})
    assert (router.last.sampling.top_p, router.last.sampling.temperature) == (0.25, 1.5)


# ---------------------------------------------------------------- whole numbers


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 4.0}, {"max_tokens": 4}),
        ({"min_tokens": 2.0}, {"min_tokens": 2}),
        ({"top_k": 16.0}, {"top_k": 16}),
        ({"top_k": -1.0}, {"top_k": 0}),
        ({"seed": 7.0}, {"seed": 7}),
        ({"logprobs": 2.0}, {"num_logprobs": 2}),
        ({"stop_token_ids": [5.0, 6]}, {"stop_token_ids": [5, 6]}),
        ({"n": 1.0, "best_of": 1.0, "priority": 3.0}, {}),
    ],
)
def test_whole_numbers_may_be_written_with_a_point(body: dict[str, Any], expected: dict[str, Any]) -> None:
    router = InstantRouter()
    router.answer(COMPLETIONS, {"prompt": "a", **body})
    sampling = router.last.sampling
    assert {name: getattr(sampling, name) for name in expected} == expected
    assert all(type(getattr(sampling, name)) is not float for name in expected)


@pytest.mark.parametrize(("prompt", "token_ids"), [([65.0, 66], [[65, 66]]), ([[1.0], [2]], [[1], [2]])])
def test_token_ids_may_be_written_with_a_point(prompt: list[Any], token_ids: list[list[int]]) -> None:
    router = InstantRouter()
    router.answer(COMPLETIONS, {"prompt": prompt})
    assert [request.prompt_token_ids for request in router.service.submitted] == token_ids
    assert all(type(token_id) is int for request in router.service.submitted for token_id in request.prompt_token_ids)
    assert router.post("/detokenize", {"tokens": [65.0]}).json() == router.post("/detokenize", {"tokens": [65]}).json()


@pytest.mark.parametrize("value", ["16", "16.0", 16.5, True, [16]])
def test_other_things_are_no_integers(value: object) -> None:
    response = InstantRouter().post(COMPLETIONS, {"prompt": "a", "max_tokens": value})
    assert response.status_code == 400
    assert "should be an integer" in response.json()["error"]["message"]


@pytest.mark.parametrize("key", ["1.0", "+1", " 1", "1_0", "\u0663", "-1", "", "9" * 30])
def test_keys_of_logit_bias_are_token_ids_in_digits(key: str) -> None:
    response = InstantRouter().post(COMPLETIONS, {"prompt": "a", "logit_bias": {key: 1}})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "logit_bias: should have token ids as keys"


# ---------------------------------------------------------------- tools


@pytest.mark.parametrize("choice", [None, "none", "auto"])
@pytest.mark.parametrize("tools", [{}, {"tools": None}, {"tools": []}])
def test_tool_choice_that_asks_for_no_tool_is_no_fault(choice: str | None, tools: dict[str, Any]) -> None:
    router = InstantRouter()
    body = {"messages": HI, "seed": 0}
    assert router.answer(CHAT, {**body, "tool_choice": choice, **tools}) == router.answer(CHAT, body)


# ---------------------------------------------------------------- models


def aliased(**model: object) -> InstantRouter:
    data = config().model_dump(mode="json", exclude_unset=True)
    data["model"] = {"path": "models/nowhere", "served_name": "demo", "max_model_len": 512, **model}
    return InstantRouter(ClusterConfig.from_data(data))


@pytest.mark.parametrize("name", ["demo", "gpt-4o", "org/other", "models/nowhere", "./models/nowhere/", "root"])
def test_each_name_of_the_model_is_accepted_and_echoed(name: str) -> None:
    router = aliased(aliases=["gpt-4o", "org/other"])
    asked = router.service.model.root if name == "root" else name
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HI})):
        assert router.answer(path, {**body, "model": asked})["model"] == asked
        chunks = router.post(path, {**body, "model": asked, "stream": True}).text
        events = [json.loads(event[6:]) for event in chunks.split("\n\n") if event.startswith("data: {")]
        assert {event["model"] for event in events} == {asked}
    for path, field in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert router.post(path, {**field, "model": asked}).status_code == 200
    if not asked.startswith("."):  # no client sends such a path: they normalize it
        card = router.request("GET", f"/v1/models/{asked}").json()
        assert (card["id"], card["root"], card["max_model_len"]) == (asked, router.service.model.root, 512)


def test_the_model_list_has_every_name_with_the_first_name_first() -> None:
    cards = aliased(aliases=["gpt-4o", "org/other"]).request("GET", "/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["demo", "gpt-4o", "org/other"]
    assert len({card["root"] for card in cards}) == 1


def test_without_a_model_the_answer_has_the_first_name() -> None:
    assert aliased(aliases=["other"]).answer(COMPLETIONS, {"prompt": "a"})["model"] == "demo"
    assert aliased().answer(COMPLETIONS, {"prompt": "a", "model": None})["model"] == "demo"


@pytest.mark.parametrize("name", ["", "gpt-4", "nowhere", "Demo", "demo/", "other/nowhere", "odels/nowhere", "/", "."])
def test_other_names_are_404(name: str) -> None:
    router = aliased(aliases=["gpt-4o"])
    response = router.post(COMPLETIONS, {"prompt": "a", "model": name})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_the_end_of_a_hugging_face_path_is_a_name() -> None:
    model = aliased().service.model
    assert model_name("models/nowhere", model) == "models/nowhere"


# ---------------------------------------------------------------- tokenizer info


def test_tokenizer_info_of_a_checkpoint(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "tiny", "qwen3", 0)
    data = config().model_dump(mode="json", exclude_unset=True)
    router = InstantRouter(ClusterConfig.from_data({**data, "model": {"path": str(tmp_path / "tiny")}}))
    response = router.request("GET", "/tokenizer_info")
    written = json.loads((tmp_path / "tiny" / "tokenizer_config.json").read_text())
    assert response.status_code == 200
    assert response.json() == {"tokenizer_class": "PreTrainedTokenizerFast", **written, **response.json()}
    assert response.json()["chat_template"] == router.service.model.tokenizer.chat_template
    assert "message" in response.json()["chat_template"]


def test_tokenizer_info_without_a_checkpoint() -> None:
    info = InstantRouter().request("GET", "/tokenizer_info").json()
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "assistant: " in info["chat_template"]
