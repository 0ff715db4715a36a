"""Requests that must be refused: typed, naming the field, and before anything starts."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import httpx
import pytest
from fake_nodes import clients_app, config
from starlette.types import ASGIApp

from kvrelay.machine.clock import Clock
from router.model import load_model
from router.service import RouterService

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD_CALL = {"function": {"name": "f", "arguments": "{"}}
HI = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@cache
def app() -> ASGIApp:
    settings, clock = config(max_body_bytes=4096, max_queued_requests=64), Clock()
    service = RouterService(settings, load_model(settings), clock)
    return clients_app(service)


def answer(method: str, path: str, **options: Any) -> httpx.Response:
    """Ask a router whose machine is not even running: it must not come to that."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app()), base_url="http://router") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        (COMPLETIONS, {}, "prompt", "is required"),
        (COMPLETIONS, {"prompt": None}, "prompt", "is required"),
        (COMPLETIONS, {"prompt": 3}, "prompt", "should be a string"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "empty"),
        (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt", "no tokens"),
        (COMPLETIONS, {"prompt": [[1], []]}, "prompt", "empty list"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "should be a string"),
        (COMPLETIONS, {"prompt": [True]}, "prompt", "should be a string"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt", "should be a string"),
        (COMPLETIONS, {"prompt": [99999]}, "prompt", "vocabulary has 1024"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens", "should be 0 or more, not -1"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "7"}, "max_tokens", "integer, not '7'"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, "max_tokens", "integer"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 2, "min_tokens": 3}, "min_tokens", "3 is more than"),
        (COMPLETIONS, {"prompt": "a", "min_tokens": -1}, "min_tokens", "0 or more"),
        (COMPLETIONS, {"prompt": "a", "temperature": -0.1}, "temperature", "0 or more, not -0.1"),
        (COMPLETIONS, {"prompt": "a", "temperature": 2.1}, "temperature", "should be 2 or less, not 2.1"),
        (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature", "number, not 'hot'"),
        (COMPLETIONS, {"prompt": "a", "top_p": -0.5}, "top_p", "should be 0 or more"),
        (COMPLETIONS, {"prompt": "a", "top_p": 1.01}, "top_p", "1 or less"),
        (COMPLETIONS, {"prompt": "a", "top_k": -2}, "top_k", "-1 or more"),
        (COMPLETIONS, {"prompt": "a", "min_p": 2}, "min_p", "1 or less"),
        (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        (COMPLETIONS, {"prompt": "a", "presence_penalty": 3}, "presence_penalty", "2 or less"),
        (COMPLETIONS, {"prompt": "a", "frequency_penalty": -3}, "frequency_penalty", "-2 or more"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "100 or less"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias", "token ids as keys"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"2000": 1}}, "logit_bias", "2000 is not a token id"),
        (COMPLETIONS, {"prompt": "a", "seed": 1 << 70}, "seed", "9223372036854775807 or less"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "1 or more"),
        (COMPLETIONS, {"prompt": "a", "n": 129}, "n", "128 or less"),
        (COMPLETIONS, {"prompt": "a", "n": 65}, "n", "65 requests; the limit is 64"),
        (COMPLETIONS, {"prompt": "a", "n": 2, "best_of": 3}, "best_of", "only supported if equal to n"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop", "not be empty"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, "stop", "at most 16"),
        (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop", "string"),
        (COMPLETIONS, {"prompt": "a", "stop": ["x" * 1025]}, "stop", "at most 1024"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [1024]}, "stop_token_ids", "1024 is not a token id"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "20 or less"),
        (COMPLETIONS, {"prompt": "a", "logprobs": True}, "logprobs", "integer, not True"),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs", "-1"),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs", "20"),
        (CHAT, {"messages": HI, "prompt_logprobs": 21}, "prompt_logprobs", "20"),
        (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream", "true or false, not 'yes'"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options", "when stream is true"),
        (COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": 1}, "stream_options", "not 1"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        (COMPLETIONS, {"prompt": "a", "response_format": {"type": "xml"}}, "response_format", "only 'text'"),
        (CHAT, {}, "messages", "is required"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": ["hi"]}, "messages", "messages.0"),
        (CHAT, {"messages": [{"content": "hi"}]}, "messages", "messages.0.role: is required"),
        (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", "'image_url' are not supported"),
        (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", "messages.0.content: parts of type"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "and a text"),
        (
            CHAT,
            {"messages": [{"role": "user", "tool_calls": [BAD_CALL]}]},
            "messages",
            "0.tool_calls: arguments should be",
        ),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages", "messages.0.content: should be a string"),
        (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools", "function should be an object"),
        (CHAT, {"messages": HI, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        (CHAT, {"messages": HI, "logprobs": 2}, "logprobs", "true or false"),
        (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens", "1 or more, not 0"),
        (CHAT, {"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens", "1 or more"),
        (CHAT, {"messages": HI, "tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            CHAT,
            {"messages": HI, "tool_choice": {"type": "function"}},
            "tool_choice",
            "type 'function' and the function",
        ),
        (CHAT, {"messages": HI, "function_call": {"name": "f"}}, "function_call", "only 'none' and 'auto'"),
        (
            CHAT,
            {"messages": HI, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "not together",
        ),
        ("/tokenize", {"prompt": 3}, "prompt", "a string"),
        ("/detokenize", {"tokens": [5000]}, "tokens", "5000 is not a token id"),
        ("/detokenize", {"tokens": ["a"]}, "tokens", "integer"),
    ],
)
def test_wrong_field_is_named_with_its_limit(path: str, body: dict[str, Any], param: str, said: str) -> None:
    response = answer("POST", path, json={"model": "demo", **body})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_request_error"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "JSON object"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"a":' + b"[" * 3000 + b"]" * 900 + b"}", "not JSON"),
    ],
    ids=["empty", "cut off", "no UTF-8", "no object", "half a surrogate pair", "too deep"],
)
def test_body_that_is_no_json_object(path: str, content: bytes, said: str) -> None:
    response = answer("POST", path, content=content)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize(
    "field", ["logit_bias", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"]
)
def test_a_number_that_is_not_finite_is_refused(field: str, number: str) -> None:
    """Several JSON writers put such numbers out, and Python's reads them."""
    value = f'{{"1": {number}}}' if field == "logit_bias" else number
    response = answer("POST", COMPLETIONS, content=f'{{"prompt": "a", "{field}": {value}}}'.encode())
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_body_that_is_too_long_is_413(path: str) -> None:
    response = answer("POST", path, content=b"[" + b" " * 5000)
    assert response.status_code == 413
    assert "4096 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "a"}),
        (CHAT, {"messages": HI}),
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": HI}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_unknown_model_is_404(path: str, body: dict[str, Any]) -> None:
    response = answer("POST", path, json={**body, "model": "gpt-5"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"
    assert "'gpt-5'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/cluster/requests/unknown", 404, "not_found"),
        ("POST", "/cluster/nodes/m0/drain", 404, "not_found"),  # it is the operators'
    ],
)
def test_wrong_place_or_method_is_told_in_the_same_form(method: str, path: str, status: int, code: str) -> None:
    response = answer(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


# ---------------------------------------------------------------- what needs no node


def test_models() -> None:
    (card,) = answer("GET", "/v1/models").json()["data"]
    assert card["id"] == "demo"
    assert card["root"].endswith("nowhere")
    assert card["max_model_len"] == 512
    assert answer("GET", "/v1/models/demo").json()["id"] == "demo"


def test_tokens_there_and_back() -> None:
    tokens = answer("POST", "/tokenize", json={"prompt": "Hé 🦊", "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) == len("Hé 🦊".encode())
    assert tokens["max_model_len"] == 512
    assert answer("POST", "/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "Hé 🦊"}
    chat = answer("POST", "/tokenize", json={"messages": HI}).json()
    assert chat["token_strs"] is None
    assert answer("POST", "/detokenize", json={"tokens": chat["tokens"]}).json() == {"prompt": "user: hi\nassistant: "}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/metrics", "/health", "/version"])
def test_probes(method: str, path: str) -> None:
    response = answer(method, path)
    assert response.status_code == 200
    assert bool(response.content) is (method == "GET")


def test_cluster_without_nodes() -> None:
    status = answer("GET", "/cluster").json()
    assert status["nodes"] == []
    assert status["ready"] is False
    assert status["requests"]["running"] == 0
