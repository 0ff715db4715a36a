"""Tools over HTTP, from nodes that answer what a test says: fields, whole answers and streams."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_nodes import FakeCluster, Script
from instant_router import InstantRouter
from support.tools import joined_chunks, without_ids
from test_http_generation import post, run, stream

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
END = "\x00"
"""The last character of each answer. Its token ends it."""

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
TWO_CALLS = (
    "<think>\nBoth.\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"place": "Žilina"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


def call_of(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def ended(cluster: FakeCluster, **body: object) -> dict[str, Any]:
    [end] = cluster.model.tokenizer.encode(END)
    return {"messages": HI, "max_tokens": 400, "stop_token_ids": [end], **body}


def test_calls_and_reasoning_whole_and_streamed() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = ended(cluster, tools=TOOLS)
        [choice] = (await post(cluster, CHAT, **body))["choices"]
        message = without_ids(choice["message"])
        assert choice["finish_reason"] == "tool_calls"
        assert message == {
            "role": "assistant",
            "content": "I look.",
            "refusal": None,
            "reasoning_content": "Both.",
            "tool_calls": [call_of("weather", '{"place": "Žilina"}'), call_of("now", "{}")],
        }
        streamed = joined_chunks(await stream(cluster, CHAT, **body))
        assert without_ids(streamed["message"]) == message
        assert streamed["finish_reason"] == "tool_calls"
        [choice] = (await post(cluster, CHAT, **body, parallel_tool_calls=False))["choices"]
        assert without_ids(choice["message"])["tool_calls"] == message["tool_calls"][:1]
        streamed = joined_chunks(await stream(cluster, CHAT, **body, parallel_tool_calls=False))
        assert without_ids(streamed["message"])["tool_calls"] == message["tool_calls"][:1]

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes", reasoning_parser="think")


def test_without_reasoning_and_without_tools() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        for tools in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            body = ended(cluster, include_reasoning=False, **tools)
            [choice] = (await post(cluster, CHAT, **body))["choices"]
            assert choice["message"]["content"] == TWO_CALLS.partition("</think>\n\n")[2]
            assert choice["finish_reason"] == "stop"
            assert not {"tool_calls", "reasoning_content"} & choice["message"].keys()
            streamed = joined_chunks(await stream(cluster, CHAT, **body))
            assert streamed["message"]["content"] == choice["message"]["content"]

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes", reasoning_parser="think")


def test_an_output_that_is_cut_off_has_the_call_as_far_as_it_got() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = ended(cluster, tools=TOOLS, max_tokens=TWO_CALLS.index("lina"))
        [choice] = (await post(cluster, CHAT, **body))["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"place": "')
        streamed = joined_chunks(await stream(cluster, CHAT, **body))["message"]
        assert without_ids(streamed)["tool_calls"] == without_ids(choice["message"])["tool_calls"]

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes", reasoning_parser="think")


def test_tokens_and_logprobs_are_complete_in_a_stream() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = ended(cluster, tools=TOOLS, logprobs=True, return_token_ids=True, n=2, seed=0)
        whole = (await post(cluster, CHAT, **body))["choices"]
        ids: list[list[int]] = [[], []]
        logprobs: list[list[object]] = [[], []]
        for chunk in await stream(cluster, CHAT, **body):
            [choice] = chunk["choices"]
            ids[choice["index"]] += choice["token_ids"]
            logprobs[choice["index"]] += choice["logprobs"]["content"]
        assert ids == [choice["token_ids"] for choice in whole]
        assert logprobs == [choice["logprobs"]["content"] for choice in whole]

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes")


NAME = "function.name should be 1 to 128 letters, digits or any of _ - . : /"
WRONG_TOOLS: list[tuple[object, str]] = [
    ({}, "tools: should be a list, not an object"),
    ([1], "tools.0: should be an object with type 'function' and a function"),
    ([{"type": "custom", "custom": {}}], "tools.0: type 'custom' is not supported, only 'function' is"),
    ([{"type": "function"}], "tools.0: function should be an object"),
    ([TOOLS[1], {"function": {}}], f"tools.1: {NAME}, not None"),
    ([{"function": {"name": "a b"}}], f"tools.0: {NAME}, not 'a b'"),
    (
        [{"function": {"name": "a", "parameters": []}}],
        "tools.0: function.parameters should be a JSON schema: an object, not a list of 0",
    ),
    ([{"function": {"name": "a", "description": 1}}], "tools.0: function.description should be a string, not 1"),
    ([{"function": {"name": "a", "strict": 1}}], "tools.0: function.strict should be true or false, not 1"),
    ([TOOLS[0], TOOLS[0]], "tools.1.function.name: 'weather' is there twice"),
    ([{"function": {"name": f"f{n}"}} for n in range(1025)], "tools: should have at most 1024 items"),
]


@pytest.mark.parametrize(("tools", "message"), WRONG_TOOLS)
def test_wrong_tools(tools: object, message: str) -> None:
    response = InstantRouter(tool_parser="hermes").post(CHAT, {"messages": HI, "tools": tools})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == message
    assert response.json()["error"]["param"] == "tools"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "tool_choice: should be 'none', 'auto', 'required', an object"),
        ({"type": "function"}, "tool_choice: should be 'none', 'auto', 'required', an object"),
        ({"type": "function", "function": {"name": 1}}, "tool_choice: function.name should be 1 to 128"),
        ({"type": "function", "function": {"name": "nobody"}}, "tool_choice: 'nobody' is none of tools"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            "tool_choice: allowed_tools.tools should have 1 to 1024 items",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "x"}]}},
            "tool_choice: allowed_tools.tools should hold objects with type 'function' and a function",
        ),
    ],
)
def test_wrong_choices(choice: object, message: str) -> None:
    router = InstantRouter(tool_parser="hermes")
    response = router.post(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": choice})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)
    assert response.json()["error"]["param"] == "tool_choice"


def test_choices_without_tools() -> None:
    router = InstantRouter(tool_parser="hermes")
    for choice in ("none", "auto"):
        assert router.post(CHAT, {"messages": HI, "tool_choice": choice, "tools": []}).status_code == 200
    response = router.post(CHAT, {"messages": HI, "tool_choice": "required"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "tool_choice: needs tools"


def test_a_model_without_a_format_of_tool_calls() -> None:
    router = InstantRouter()
    response = router.post(CHAT, {"messages": HI, "tools": TOOLS})
    assert response.status_code == 400
    assert "router.tool_parser" in response.json()["error"]["message"]
    for choice in ("none", "required"):
        body = {"messages": HI, "tools": TOOLS, "tool_choice": choice, "stop_token_ids": [0]}
        assert router.post(CHAT, body).status_code == 200


def test_many_tools_in_a_worker() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        many = [{"type": "function", "function": {"name": f"f{n}", "parameters": PLACE}} for n in range(1000)]
        [choice] = (await post(cluster, CHAT, **ended(cluster, tools=[*many, *TOOLS])))["choices"]
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather", "now"]

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes")


def test_the_arguments_are_json() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        [choice] = (await post(cluster, CHAT, **ended(cluster, tools=TOOLS)))["choices"]
        arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
        assert json.loads(arguments) == {"place": "Žilina"}

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes")
