"""Every field of the message requests of the ``anthropic`` package: honoured, ignored or refused by name.

The package is no dependency of the tests: the names are those of its version 2.14.0, in ``MessageCreateParamsBase``,
also that in ``beta``, in ``MessageCountTokensParams``, and what ``parse`` and ``stream`` add.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import pytest
from instant_router import InstantRouter

from router.anthropic.schemas import MessagesRequest
from router.openai.schemas import IGNORED_FIELDS

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
STABLE = {
    "cache_control", "container", "diagnostics", "inference_geo", "max_tokens", "messages", "metadata", "model",
    "output_config", "service_tier", "speed", "stop_sequences", "stream", "system", "thinking", "tool_choice", "tools",
    "user_profile_id", "workspace_id",
}  # fmt: skip
BETA = STABLE | {
    "betas", "billing_policy", "compaction", "context_management", "fallback_credit_token", "fallbacks", "mcp_servers",
    "output_format", "thread",
}  # fmt: skip
COUNTED = {
    "cache_control", "messages", "model", "output_config", "speed", "system", "thinking", "tool_choice", "tools",
    "user_profile_id", "workspace_id",
}  # fmt: skip
SAMPLING = {"temperature", "top_k", "top_p"}
"""Fields of older versions that clients still send."""

HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "description": "does it", "input_schema": {"type": "object", "properties": {}}}
BODY: dict[str, Any] = {"messages": HI, "max_tokens": 3, "seed": 0}


class Field(NamedTuple):
    """``kind``: what happens to a request with ``value``. ``more``: other fields that it needs.

    What is honoured as the default shows in nothing.
    """

    kind: Literal["honoured", "default", "ignored", "refused"]
    value: object
    more: dict[str, Any] = {}  # noqa: RUF012 (never changed)


FIELDS: dict[str, Field] = {
    "betas": Field("ignored", ["context-1m-2025-08-07"]),
    "billing_policy": Field("ignored", {"type": "billing_policy", "bill_to": "user_profile"}),
    "cache_control": Field("ignored", {"type": "ephemeral"}),
    "compaction": Field("refused", {"type": "enabled"}),
    "container": Field("refused", "container_1"),
    "context_management": Field("refused", {"edits": [{"type": "clear_tool_uses_20250919"}]}),
    "diagnostics": Field("ignored", {"previous_message_id": "msg_1"}),
    "fallback_credit_token": Field("ignored", "token"),
    "fallbacks": Field("ignored", [{"model": "another"}]),
    "inference_geo": Field("ignored", "eu"),
    "max_tokens": Field("honoured", 2),
    "mcp_servers": Field("refused", [{"type": "url", "name": "s", "url": "https://host"}]),
    "messages": Field("honoured", [{"role": "user", "content": [{"type": "text", "text": "ho"}]}]),
    "metadata": Field("ignored", {"user_id": "u"}),
    "model": Field("default", "demo"),
    "output_config": Field("default", {"effort": "low"}),
    "output_format": Field("refused", {"type": "json_schema", "schema": {}}),
    "service_tier": Field("ignored", "auto"),
    "speed": Field("ignored", "fast"),
    "stop_sequences": Field("honoured", ["c"]),
    "stream": Field("default", False),
    "system": Field("honoured", [{"type": "text", "text": "be brief"}]),
    "temperature": Field("honoured", 0.5),
    "thinking": Field("default", {"type": "disabled"}),
    "thread": Field("refused", {"type": "create"}),
    "tool_choice": Field("default", {"type": "none"}, {"tools": [TOOL]}),
    "tools": Field("default", [TOOL]),
    "top_k": Field("honoured", 5),
    "top_p": Field("honoured", 0.5),
    "user_profile_id": Field("ignored", "profile"),
    "workspace_id": Field("ignored", "wrkspc_1"),
}


@cache
def router() -> InstantRouter:
    return InstantRouter(tool_parser="hermes")


def what_becomes_of(body: dict[str, Any]) -> tuple[object, ...]:
    """Return the answer and what was submitted for it."""
    answer = router().answer(MESSAGES, body)
    return answer, router().last.prompt_token_ids, router().last.sampling


def test_no_field_of_the_package_is_forgotten() -> None:
    assert set(FIELDS) == BETA | SAMPLING


@pytest.mark.parametrize("name", FIELDS)
def test_the_field_is_honoured_ignored_or_refused_by_name(name: str) -> None:
    field = FIELDS[name]
    body = {**BODY, **field.more}
    if field.kind == "refused":
        response = router().post(MESSAGES, {**body, name: field.value})
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
        assert response.json()["error"]["message"].startswith(f"{name}: ")
        return
    differs = what_becomes_of({**body, name: field.value}) != what_becomes_of(body)
    assert differs == (field.kind == "honoured")


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_a_field_of_requests_that_only_count_is_treated_alike(name: str) -> None:
    field = FIELDS[name]
    response = router().post(COUNT, {"messages": HI, **field.more, name: field.value})
    assert response.status_code == 200, response.text
    assert response.json()["input_tokens"] > 0


def test_ignored_fields_are_not_logged_as_unknown() -> None:
    ignored = {name for name, field in FIELDS.items() if field.kind == "ignored"}
    assert ignored <= {*IGNORED_FIELDS, *MessagesRequest.ignored, *MessagesRequest.model_fields}
