"""Every field of the request types of the ``openai`` package: honoured, ignored or refused by name."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any, Literal, NamedTuple

import pytest
from instant_router import InstantRouter
from openai.types import completion_create_params as completion_types
from openai.types.chat import completion_create_params as chat_types
from openai.types.responses import input_token_count_params as input_tokens_types
from openai.types.responses import response_create_params as responses_types

from router.openai.schemas import IGNORED_FIELDS
from router.responses.schemas import ResponsesRequest

SDK_VERSION = "3.57.0"
"""The version of the package that these are the fields of."""

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
INPUT_TOKENS = "/v1/responses/input_tokens"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a", "seed": 0},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "seed": 0},
    RESPONSES: {"input": "hi", "seed": 0},
    INPUT_TOKENS: {"input": "hi"},
}
SDK_TYPES = {
    COMPLETIONS: completion_types.CompletionCreateParamsBase,
    CHAT: chat_types.CompletionCreateParamsBase,
    RESPONSES: responses_types.ResponseCreateParamsBase,
    INPUT_TOKENS: input_tokens_types.InputTokenCountParams,
}


class Field(NamedTuple):
    """``kind``: what happens to a request with ``value``. ``more``: other fields that it needs.

    What is echoed is ignored, and the answer repeats it.
    """

    kind: Literal["honoured", "ignored", "echoed", "refused"]
    value: object
    more: dict[str, Any] = {}  # noqa: RUF012 (never changed)


BOTH = {
    "frequency_penalty": Field("honoured", 0.5),
    "logit_bias": Field("honoured", {"65": 1}),
    "max_tokens": Field("honoured", 2),
    "model": Field("honoured", "demo"),
    "n": Field("honoured", 2),
    "presence_penalty": Field("honoured", 0.5),
    "seed": Field("honoured", 7),
    "stop": Field("honoured", ["B"]),
    "stream_options": Field("honoured", {"include_usage": True, "include_obfuscation": True}, {"stream": True}),
    "temperature": Field("honoured", 0.5),
    "top_p": Field("honoured", 0.5),
    "user": Field("ignored", "u"),
}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
FIELDS: dict[str, dict[str, Field]] = {
    COMPLETIONS: {
        **BOTH,
        "best_of": Field("refused", 2),
        "echo": Field("honoured", True),
        "logprobs": Field("honoured", 1),
        "prompt": Field("honoured", "b"),
        "suffix": Field("refused", "after"),
    },
    CHAT: {
        **BOTH,
        "audio": Field("ignored", {"format": "wav", "voice": "alloy"}),
        "function_call": Field("ignored", "none"),
        "functions": Field("refused", [FUNCTION]),
        "logprobs": Field("honoured", True),
        "max_completion_tokens": Field("honoured", 2),
        "messages": Field("honoured", [{"role": "user", "content": "ho"}]),
        "metadata": Field("ignored", {"a": "b"}),
        "modalities": Field("refused", ["text", "audio"]),
        "moderation": Field("refused", {"model": "m"}),
        "parallel_tool_calls": Field("honoured", False),
        "prediction": Field("ignored", {"type": "content", "content": "AB"}),
        "prompt_cache_key": Field("ignored", "k"),
        "prompt_cache_options": Field("ignored", {"mode": "implicit", "ttl": "30m"}),
        "prompt_cache_retention": Field("ignored", "24h"),
        "reasoning_effort": Field("honoured", "low"),
        "response_format": Field("honoured", {"type": "text"}),
        "safety_identifier": Field("ignored", "s"),
        "service_tier": Field("ignored", "auto"),
        "store": Field("ignored", True),
        "tool_choice": Field("honoured", "none"),
        "tools": Field("honoured", [{"type": "function", "function": FUNCTION}]),
        "top_logprobs": Field("honoured", 2, {"logprobs": True}),
        "verbosity": Field("honoured", "low"),
        "web_search_options": Field("refused", {"search_context_size": "low"}),
    },
    RESPONSES: {
        "access_programs": Field("ignored", {"cyber": "standard"}),
        "background": Field("refused", True),
        "background_options": Field("ignored", {"completion_window": "soonest"}),
        "context_management": Field("refused", [{"type": "compaction"}]),
        "conversation": Field("refused", "conv_1"),
        "image": Field("ignored", {"context_compression": "auto"}),
        "include": Field("honoured", ["message.output_text.logprobs"]),
        "input": Field("honoured", [{"role": "user", "content": "ho"}]),
        "instructions": Field("honoured", "be brief"),
        "max_output_tokens": Field("honoured", 2),
        "max_tool_calls": Field("ignored", 2),
        "metadata": Field("echoed", {"a": "b"}),
        "model": Field("honoured", "demo"),
        "moderation": Field("refused", {"model": "m"}),
        "parallel_tool_calls": Field("honoured", False),
        "previous_response_id": Field("refused", "resp_1"),
        "prompt": Field("refused", {"id": "p"}),
        "prompt_cache_key": Field("echoed", "k"),
        "prompt_cache_options": Field("ignored", {"mode": "implicit", "ttl": "30m"}),
        "prompt_cache_retention": Field("ignored", "24h"),
        "reasoning": Field("honoured", {"effort": "low", "summary": "auto"}),
        "safety_identifier": Field("echoed", "s"),
        "service_tier": Field("ignored", "auto"),
        "store": Field("ignored", True),
        "stream_options": Field("honoured", {"include_obfuscation": True}, {"stream": True}),
        "temperature": Field("honoured", 0.5),
        "text": Field("honoured", {"format": {"type": "text"}, "verbosity": "low"}),
        "tool_choice": Field("honoured", "none"),
        "tools": Field("honoured", [{"type": "function", **FUNCTION}]),
        "top_logprobs": Field("honoured", 2),
        "top_p": Field("honoured", 0.5),
        "truncation": Field("honoured", "auto"),
        "user": Field("echoed", "u"),
    },
    INPUT_TOKENS: {
        "conversation": Field("refused", "conv_1"),
        "input": Field("honoured", [{"role": "user", "content": "ho"}]),
        "instructions": Field("honoured", "be brief"),
        "model": Field("honoured", "demo"),
        "parallel_tool_calls": Field("honoured", False),
        "personality": Field("refused", "friendly"),
        "previous_response_id": Field("refused", "resp_1"),
        "reasoning": Field("honoured", {"effort": "low", "summary": "auto"}),
        "text": Field("honoured", {"format": {"type": "text"}, "verbosity": "low"}),
        "tool_choice": Field("honoured", "none"),
        "tools": Field("honoured", [{"type": "function", **FUNCTION}]),
        "truncation": Field("honoured", "auto"),
    },
}
"""By endpoint: every field, with a value that is not its default."""

CASES = [pytest.param(path, name, id=f"{path}-{name}") for path, fields in FIELDS.items() for name in fields]


@cache
def router() -> InstantRouter:
    return InstantRouter(tool_parser="hermes")


@pytest.mark.parametrize("path", FIELDS)
def test_no_field_of_the_package_is_forgotten(path: str) -> None:
    if importlib.metadata.version("openai") != SDK_VERSION:
        pytest.skip(f"the list is that of openai {SDK_VERSION}")
    assert set(SDK_TYPES[path].__annotations__) == set(FIELDS[path])


@pytest.mark.parametrize(("path", "name"), CASES)
def test_the_field_is_honoured_ignored_or_refused_by_name(path: str, name: str) -> None:
    field = FIELDS[path][name]
    body = {**BODIES[path], **field.more}
    response = router().post(path, {**body, name: field.value})
    if field.kind == "refused":
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", name)
        return
    assert response.status_code == 200, response.text
    if field.kind in ("ignored", "echoed"):
        submitted, given = router().last, _comparable(response.json())
        if field.kind == "echoed":
            assert given.pop(name) == field.value
        without = _comparable(router().answer(path, body))
        assert given == {key: value for key, value in without.items() if field.kind == "ignored" or key != name}
        assert router().last.sampling == submitted.sampling
        assert router().last.prompt_token_ids == submitted.prompt_token_ids


def _comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """Return ``answer`` without what differs between equal ones."""
    items = [{key: value for key, value in item.items() if key != "id"} for item in answer.get("output", ())]
    return {key: value for key, value in answer.items() if key not in ("id", "created", "created_at")} | {
        "output": items
    }


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (CHAT, "modalities", ["text"]),
        (CHAT, "verbosity", "medium"),
        (COMPLETIONS, "best_of", 1),
        (COMPLETIONS, "best_of", 0),
    ],
)
def test_a_value_that_asks_for_nothing_else_is_accepted(path: str, name: str, value: object) -> None:
    assert router().answer(path, {**BODIES[path], name: value}) == router().answer(path, BODIES[path])


def test_ignored_fields_are_not_logged_as_unknown() -> None:
    known = {*IGNORED_FIELDS, *ResponsesRequest.ignored, "user", "function_call"}
    ignored = {name for fields in FIELDS.values() for name, field in fields.items() if field.kind == "ignored"}
    assert ignored <= known
