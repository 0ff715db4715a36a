"""A null is as good as an absent field, in every field of every endpoint; no value of a field causes a 500."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instant_router import InstantRouter

from router.openai.fields import Fields
from router.openai.schemas import (
    IGNORED_FIELDS,
    REFUSED_FIELDS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseFormat,
    StreamOptions,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from router.text.tokenizer import TextTokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
ENDPOINTS: list[tuple[str, type[Fields], dict[str, Any]]] = [
    (COMPLETIONS, CompletionRequest, {"prompt": "a", "seed": 0}),
    (CHAT, ChatCompletionRequest, {"messages": HI, "seed": 0}),
    ("/tokenize", TokenizeTextRequest, {"prompt": "a"}),
    ("/tokenize", TokenizeChatRequest, {"messages": HI}),
    ("/detokenize", DetokenizeRequest, {"tokens": [65]}),
]
KNOWN = {path: sorted({*kind.model_fields, *REFUSED_FIELDS, *IGNORED_FIELDS}) for path, kind, _ in ENDPOINTS}
EVERY_FIELD = [
    pytest.param(path, body, name, id=f"{kind.__name__}.{name}")
    for path, kind, body in ENDPOINTS
    for name in sorted({*kind.model_fields, *REFUSED_FIELDS, *IGNORED_FIELDS})
]


@cache
def router() -> InstantRouter:
    return InstantRouter()


@pytest.mark.parametrize(("path", "body", "name"), EVERY_FIELD)
def test_null_is_as_good_as_an_absent_field(path: str, body: dict[str, Any], name: str) -> None:
    absent = {key: value for key, value in body.items() if key != name}
    without, null = (router().post(path, request) for request in (absent, {**absent, name: None}))
    assert null.status_code == without.status_code
    assert _comparable(null.json()) == _comparable(without.json())
    required = name in ("prompt", "messages", "tokens")
    assert null.status_code == (400 if required else 200), null.text
    if required:
        assert null.json()["error"]["message"].endswith(": is required")


def _comparable(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_all_fields_null_at_once(path: str) -> None:
    body = next(body for place, _, body in ENDPOINTS if place == path)
    nulls = dict.fromkeys(KNOWN[path], None)
    assert router().answer(path, {**nulls, **body}) == router().answer(path, body)


@pytest.mark.parametrize("name", sorted(StreamOptions.model_fields))
def test_null_in_stream_options(name: str) -> None:
    body = {"prompt": "a", "stream": True, "stream_options": {name: None}}
    assert router().post(COMPLETIONS, body).text.count("data: ") == 5


def test_null_in_response_format() -> None:
    assert set(ResponseFormat.model_fields) == {"type", "json_schema"}
    body = {"prompt": "a", "response_format": {"type": None, "json_schema": None}}
    assert router().post(COMPLETIONS, body).status_code == 200


@pytest.mark.parametrize("name", ["content", "name", "tool_calls", "refusal", "audio", "reasoning_content"])
def test_null_in_a_message_does_not_get_to_the_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    tokenizer = router().service.model.tokenizer
    render = type(tokenizer).render_chat

    def watched(self: TextTokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        shown.append([dict(message) for message in messages])
        return render(self, messages, **options)

    monkeypatch.setattr(type(tokenizer), "render_chat", watched)
    message = {key: value for key, value in HI[0].items() if key != name}
    for sent in (message, {**message, name: None}):
        assert router().post(CHAT, {"messages": [sent]}).status_code == 200
    assert shown[0] == shown[1]


def test_null_content_is_as_good_as_none() -> None:
    null, absent = ({"messages": [{"role": "user", **content}]} for content in ({"content": None}, {}))
    assert router().answer(CHAT, null) == router().answer(CHAT, absent)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("stop", ["a", None], "stop.1: should be a string, not None"),
        ("stop_token_ids", [None], "stop_token_ids.0: should be an integer, not None"),
        ("logit_bias", {"1": None}, "logit_bias.1: should be a number, not None"),
        ("prompt", [None], "prompt: should be a string, a list"),
    ],
)
def test_null_among_items_is_refused(name: str, value: object, said: str) -> None:
    response = router().post(COMPLETIONS, {"prompt": "a", name: value})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(said)


# ---------------------------------------------------------------- whatever it is

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.sampled_from([0, 1, -1, 16.0, 1e308, -0.0, 10**400, 2**63, 2**64])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["1", "role", "content", "type", "x"]) | st.text(max_size=3), inner, max_size=4
        )
    ),
    max_leaves=8,
)
DEEP: Any = "x"
for _ in range(200):
    DEEP = {"x": [DEEP]}
NASTY = [
    True,
    0,
    -1,
    16.0,
    0.5,
    10**400,
    -(10**400),
    1e308,
    "",
    "1",
    "\0" * 9,
    [],
    [[]],
    [[1], ["a"]],
    {},
    {"1": []},
    DEEP,
    [DEEP],
]


@pytest.mark.parametrize(("path", "body", "name"), EVERY_FIELD)
def test_no_nasty_value_is_a_fault_of_ours(path: str, body: dict[str, Any], name: str) -> None:
    for value in NASTY:
        response = router().post(path, {**body, name: value})
        assert response.status_code in ((200, 400, 404) if name == "model" else (200, 400)), (value, response.text)


BODIES = st.sampled_from(ENDPOINTS).flatmap(
    lambda endpoint: st.tuples(
        st.just(endpoint[0]),
        st.just(endpoint[2]),
        st.dictionaries(st.sampled_from(KNOWN[endpoint[0]]) | st.text(max_size=5), JSON, min_size=1, max_size=3),
    )
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(BODIES)
def test_no_value_in_any_field_is_a_fault_of_ours(case: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    path, body, fields = case
    response = router().post(path, {**body, **fields})
    assert response.status_code in ((200, 400, 404) if "model" in fields else (200, 400)), response.text
    if response.status_code != 200 or not response.headers["content-type"].startswith("text/event-stream"):
        assert ("error" in response.json()) is (response.status_code != 200)
