"""What clients are told of wrong fields: our words for every kind of error, bounded, and never pydantic's."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from instant_router import InstantRouter
from pydantic import ValidationError

from kvrelay.errors import InvalidRequestError
from router.openai import schemas
from router.openai.field_types import MAX_BIASES, MAX_IDS, MAX_STOPS, shown
from router.openai.fields import Fields
from router.openai.reading import reading
from router.openai.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    parse,
)
from router.openai.unknown_fields import UnknownFields
from router.openai.wording import REASONS

HI = [{"role": "user", "content": "hi"}]
KINDS: list[type[Fields]] = [
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeTextRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
]
PYDANTICS_WORDS = re.compile(r"(?i)\binput\b|\bvalid\b|validation|dictionary|instance of|pydantic|extracted|None given")

BREAKS: dict[str, dict[str, str]] = {
    "int": {"": "int_type", "ge": "greater_than_equal", "le": "less_than_equal"},
    "float": {"": "float_type", "ge": "greater_than_equal", "gt": "greater_than", "le": "less_than_equal"},
    "bool": {"": "bool_type"},
    "str": {"": "string_type", "min_length": "string_too_short", "max_length": "string_too_long"},
    "list": {"": "list_type", "min_length": "too_short", "max_length": "too_long"},
    "dict": {"": "dict_type", "min_length": "too_short", "max_length": "too_long"},
    "model": {"": "model_type"},
    "model-fields": {"": "missing"},
    "function-before": {"": "wrong"},
    "function-after": {"": "wrong"},
    "function-plain": {"": "wrong"},
    "any": {},
    "nullable": {},
    "default": {},
    "model-field": {},
    "definitions": {},
    "definition-ref": {},
}
"""What each kind of node in pydantic's core schema can complain of: by itself, and by each of its constraints."""

UNCONSTRAINED = {"int": {"strict"}, "float": {"strict", "allow_inf_nan"}, "list": {"fail_fast", "strict"}}


def core_nodes(schema: object) -> Iterator[dict[str, Any]]:
    """Yield every node of a core schema that reads something."""
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        for key, value in schema.items():
            if key not in ("metadata", "config", "serialization", "function", "default", "json_schema_input_schema"):
                yield from core_nodes(value)
    elif isinstance(schema, (list, tuple)):
        for item in schema:
            yield from core_nodes(item)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_pydantic_can_find_has_words_of_ours(kind: type[Fields]) -> None:
    nodes = list(core_nodes(kind.__pydantic_core_schema__))
    assert len(nodes) > len(kind.model_fields)
    for node in nodes:
        errors = BREAKS[node["type"]]
        possible = {error for constraint, error in errors.items() if not constraint or constraint in node}
        assert possible <= REASONS.keys(), node
        if node["type"] in ("int", "float", "str", "list", "dict"):
            constraints = {key for key, value in node.items() if value is not None and not key.endswith("_schema")}
            known = {*errors, *UNCONSTRAINED.get(node["type"], ()), "type", "metadata", "ref", "serialization"}
            assert constraints <= known, node


EXAMPLES: list[tuple[str, type[Fields], dict[str, Any], str]] = [
    ("missing", CompletionRequest, {}, "prompt: is required"),
    ("wrong", CompletionRequest, {"prompt": 3}, "prompt: should be a string, a list of strings, a list of token ids"),
    ("wrong", CompletionRequest, {"prompt": "a", "stop": ""}, "stop: should not be empty"),
    ("int_type", CompletionRequest, {"prompt": "a", "n": "1"}, "n: should be an integer, not '1'"),
    ("int_type", CompletionRequest, {"prompt": "a", "n": 1.5}, "n: should be an integer, not 1.5"),
    ("int_type", CompletionRequest, {"prompt": "a", "n": True}, "n: should be an integer, not True"),
    ("float_type", CompletionRequest, {"prompt": "a", "top_p": "1"}, "top_p: should be a number, not '1'"),
    (
        "finite_number",
        CompletionRequest,
        {"prompt": "a", "top_p": float("nan")},
        "top_p: should be a finite number, not nan",
    ),
    ("bool_type", CompletionRequest, {"prompt": "a", "echo": 1}, "echo: should be true or false, not 1"),
    ("string_type", CompletionRequest, {"prompt": "a", "user": 1}, "user: should be a string, not 1"),
    ("list_type", CompletionRequest, {"prompt": "a", "stop": 1}, "stop: should be a list, not 1"),
    ("list_type", ChatCompletionRequest, {"messages": {}}, "messages: should be a list, not an object"),
    (
        "dict_type",
        CompletionRequest,
        {"prompt": "a", "logit_bias": [5]},
        "logit_bias: should be an object, not a list of 1",
    ),
    ("model_type", ChatCompletionRequest, {"messages": ["hi"]}, "messages.0: should be an object, not 'hi'"),
    (
        "greater_than",
        CompletionRequest,
        {"prompt": "a", "repetition_penalty": 0},
        "repetition_penalty: should be greater than 0, not 0",
    ),
    ("greater_than_equal", CompletionRequest, {"prompt": "a", "min_p": -1}, "min_p: should be 0 or more, not -1"),
    ("less_than_equal", CompletionRequest, {"prompt": "a", "min_p": 1.5}, "min_p: should be 1 or less, not 1.5"),
    (
        "string_too_short",
        ChatCompletionRequest,
        {"messages": [{"role": ""}]},
        "messages.0.role: should have at least 1 characters",
    ),
    (
        "string_too_long",
        CompletionRequest,
        {"prompt": "a", "stop": "x" * 1025},
        "stop.0: should have at most 1024 characters",
    ),
    ("too_short", ChatCompletionRequest, {"messages": []}, "messages: should have at least 1 items"),
    (
        "too_long",
        CompletionRequest,
        {"prompt": "a", "stop": ["x"] * (MAX_STOPS + 1)},
        f"stop: should have at most {MAX_STOPS} items",
    ),
    (
        "too_long",
        CompletionRequest,
        {"prompt": "a", "stop_token_ids": [1] * (MAX_IDS + 1)},
        f"stop_token_ids: should have at most {MAX_IDS} items",
    ),
    (
        "wrong",
        CompletionRequest,
        {"prompt": "a", "logit_bias": {str(i): 1 for i in range(MAX_BIASES + 1)}},
        f"logit_bias: should have at most {MAX_BIASES} items",
    ),
]


@pytest.mark.parametrize(
    ("error", "kind", "body", "said"), EXAMPLES, ids=[f"{case[0]}-{case[3][:20]}" for case in EXAMPLES]
)
def test_words_of_each_error(error: str, kind: type[Fields], body: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as found:
        kind.model_validate(body)
    assert found.value.errors()[0]["type"] == error
    with pytest.raises(InvalidRequestError) as told:
        parse(kind, body)
    assert told.value.message.startswith(said)
    assert told.value.param == said.partition(":")[0].partition(".")[0]
    assert not PYDANTICS_WORDS.search(told.value.message)


def test_examples_show_every_word_there_is() -> None:
    assert {case[0] for case in EXAMPLES} == REASONS.keys()


# ---------------------------------------------------------------- bounded


class BigList(list[object]):
    def __repr__(self) -> str:
        raise AssertionError("the whole value was turned into text")


class BigDict(dict[str, object]):
    def __repr__(self) -> str:
        raise AssertionError("the whole value was turned into text")


class BigText(str):
    def __repr__(self) -> str:
        raise AssertionError("the whole value was turned into text")


@pytest.mark.parametrize(
    "field", ["stop", "n", "top_p", "user", "stream", "stream_options", "logit_bias", "response_format", "prompt"]
)
@pytest.mark.parametrize(
    "value", [BigList([1] * 9), BigDict({"a": 1}), BigText("x" * 9999)], ids=["list", "object", "text"]
)
def test_errors_do_not_turn_the_whole_value_into_text(field: str, value: object) -> None:
    try:
        parse(CompletionRequest, {"prompt": "a", field: value})
    except InvalidRequestError as error:
        assert error.message.startswith(field)
        assert len(error.message) < 250


def test_long_values_are_cut() -> None:
    assert shown("x" * 10**6) == repr("x" * 60 + "...")
    assert shown(10**400) == "1" + "0" * 59 + "..."
    assert shown([1] * 10**6) == "a list of 1000000"
    assert shown({"a": "b" * 10**6}) == "an object"


@pytest.mark.parametrize(
    "body",
    [
        {"model": "x" * 5000},
        {"response_format": {"type": "y" * 5000}},
        {"tool_choice": "z" * 5000},
        {"messages": [{"role": "user", "content": [{"type": "t" * 5000}]}]},
    ],
)
def test_long_values_of_the_client_are_not_sent_back(body: dict[str, Any]) -> None:
    response = InstantRouter().post("/v1/chat/completions", {"messages": HI, **body})
    assert response.status_code == (404 if "model" in body else 400)
    assert len(response.json()["error"]["message"]) < 250


# ---------------------------------------------------------------- what nobody expected


def test_an_error_nobody_expected_is_answered_400_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> CompletionRequest:
        raise TypeError("a validator of ours is wrong")

    router = InstantRouter()
    monkeypatch.setattr(CompletionRequest, "model_validate", broken)
    response = router.post("/v1/completions", {"prompt": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the request cannot be read"
    assert "a validator of ours is wrong" in caplog.text


@pytest.mark.parametrize("error", [RecursionError("too deep"), RuntimeError("odd")])
def test_a_template_that_breaks_down_is_answered_400(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:
        raise error

    router = InstantRouter()
    monkeypatch.setattr(type(router.service.model.tokenizer), "render_chat", broken)
    for path in ("/v1/chat/completions", "/tokenize"):
        response = router.post(path, {"messages": HI})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages"


def test_typed_errors_pass() -> None:
    with pytest.raises(InvalidRequestError, match="mine"), reading("other"):
        raise InvalidRequestError("mine")


# ---------------------------------------------------------------- unknown fields


def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "unknown_fields", UnknownFields())


def test_unknown_fields_are_accepted_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh(monkeypatch)
    router = InstantRouter()
    body = {"prompt": "a", "seed": 0}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            answer = router.answer("/v1/completions", {**body, "thinking_budget": 5, "metadata": {"a": 1}, "tools": []})
    assert answer == router.answer("/v1/completions", body)
    said = [record.getMessage() for record in caplog.records if record.name == "router.openai.unknown_fields"]
    assert said == ["unknown request field 'thinking_budget' is ignored"]


@pytest.mark.parametrize("status", [200, 400])
def test_unknown_fields_of_long_bodies_are_logged_once_by_the_router(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each request of this router has a worker of its own, which has seen no name before."""
    fresh(monkeypatch)
    name = "y" * 100
    long = {"prompt": [[7]] * 5000, "n": 1 if status == 200 else 2, "thinking_budget": 5, name: 1}
    router = InstantRouter(max_queued_requests=5000)
    for body in (long, long, {"prompt": "a", "thinking_budget": 5}):
        assert router.post("/v1/completions", body).status_code == (status if body is long else 200)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "unknown request field 'thinking_budget' is ignored",
        f"unknown request field '{'y' * 60}...' is ignored",
    ]
    assert "unknown request field" not in capfd.readouterr().err


def test_names_of_unknown_fields_are_remembered_within_bounds(caplog: pytest.LogCaptureFixture) -> None:
    fields = UnknownFields(max_names=5)
    for start in range(0, 100, 10):
        fields.notice(f"{'x' * 1000}{number}" if number == 3 else f"f{number}" for number in range(start, start + 10))
    assert len(caplog.records) == 5
    assert all(len(record.getMessage()) < 150 for record in caplog.records)


@pytest.mark.parametrize("name", sorted(schemas.REFUSED_FIELDS))
def test_fields_we_cannot_honour_are_refused(name: str) -> None:
    path = "/v1/completions"
    empty: list[object] = [None, False, 0, "", [], {}]
    router = InstantRouter()
    assert all(router.post(path, {"prompt": "a", name: value}).status_code == 200 for value in empty)
    response = router.post(path, {"prompt": "a", name: [1]})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": schemas.REFUSED_FIELDS[name],
        "type": "invalid_request_error",
        "param": name,
        "code": "invalid_request_error",
    }
