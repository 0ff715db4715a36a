"""``/v1/messages``: what the body becomes, whole messages, streams that say the same, and Anthropic's errors."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from fake_nodes import FakeCluster, Script
from instant_router import InstantRouter
from test_http_generation import post, run
from test_tool_calls import TOOLS, TWO_CALLS

from kvrelay.protocol.ids import NodeId
from kvrelay.protocol.messages.base import ErrorInfo
from router.anthropic.messages import chat_messages

MESSAGES = "/v1/messages"
END = "\x00"
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400}
FUNCTIONS: list[Any] = [tool["function"] for tool in TOOLS]
FLAT_TOOLS = [
    {"name": function["name"], "input_schema": function.get("parameters", {"type": "object"})} for function in FUNCTIONS
]


@cache
def router() -> InstantRouter:
    return InstantRouter()


def without_ids(value: Any) -> Any:
    """Return ``value`` without ids: they differ between equal answers."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    return (
        {name: without_ids(item) for name, item in value.items() if name != "id"} if isinstance(value, dict) else value
    )


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, whose names must be right."""
    events = []
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def rebuilt(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that a client makes of the events, which must come in Anthropic's order."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message: dict[str, Any] = events[0]["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    content: list[dict[str, Any]] = message["content"]
    is_open, arguments = False, ""
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(content)
            content.append(event["content_block"])
            is_open, arguments = True, ""
            continue
        assert is_open
        assert event["index"] == len(content) - 1
        block = content[-1]
        if event["type"] == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use":
                block["input"] = json.loads(arguments or "{}")
            continue
        delta = event["delta"]
        match block["type"], delta["type"]:
            case "text", "text_delta":
                block["text"] += delta["text"]
            case "thinking", "thinking_delta":
                block["thinking"] += delta["thinking"]
            case "tool_use", "input_json_delta":
                assert block["input"] == {}
                arguments += delta["partial_json"]
            case other:
                pytest.fail(f"{other}")
    assert not is_open
    return {**message, **events[-2]["delta"], "usage": message["usage"] | events[-2]["usage"]}


async def stream(cluster: FakeCluster, **body: object) -> list[dict[str, Any]]:
    response = await cluster.client.post(MESSAGES, json={**HI, "seed": 0, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


# ---------------------------------------------------------------- answers


def test_a_message_of_text() -> None:
    body = {**HI, "max_tokens": 2, "temperature": 0.5, "top_k": 7, "metadata": {"user_id": "u"}}
    answer = router().post(MESSAGES, body).json()
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "demo",
        "content": [{"type": "text", "text": "bc"}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("user: hi\nassistant: "),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 2,
        },
    }
    sampling = router().last.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (2, 0.5, 7)
    events = events_of(router().post(MESSAGES, {**body, "stream": True}).text)
    assert events[0]["message"]["usage"]["output_tokens"] <= 1
    assert without_ids(rebuilt(events)) == answer


def test_thinking_text_and_calls_are_blocks_whole_and_streamed() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        [end] = cluster.model.tokenizer.encode(END)
        body = {**HI, "stop_token_ids": [end], "tools": FLAT_TOOLS}
        answer = await post(cluster, MESSAGES, **body)
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)
        assert without_ids(answer["content"]) == [
            {"type": "thinking", "thinking": "Both.", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "name": "weather", "input": {"place": "Žilina"}},
            {"type": "tool_use", "name": "now", "input": {}},
        ]
        first, second = (block["id"] for block in answer["content"] if block["type"] == "tool_use")
        assert first != second
        assert without_ids(rebuilt(await stream(cluster, **body))) == without_ids(answer)
        for thinking in ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}):
            hidden = await post(cluster, MESSAGES, **{**body, "thinking": thinking})
            assert without_ids(hidden["content"]) == without_ids(answer["content"][1:])

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes", reasoning_parser="think")


def test_a_call_that_is_cut_off_has_no_input() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = {**HI, "tools": FLAT_TOOLS, "max_tokens": TWO_CALLS.index("lina")}
        answer = await post(cluster, MESSAGES, **body)
        assert answer["stop_reason"] == "max_tokens"
        assert without_ids(answer["content"][-1]) == {"type": "tool_use", "name": "weather", "input": {}}

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes", reasoning_parser="think")


def test_a_stop_sequence_is_told() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = {**HI, "stop_sequences": ["xyz", "look"]}
        answer = await post(cluster, MESSAGES, **body)
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "look")
        assert answer["content"] == [{"type": "text", "text": "I "}]
        assert without_ids(rebuilt(await stream(cluster, **body))) == without_ids(answer)

    run(scenario, Script("I look."))


def test_a_message_without_text_has_no_blocks() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        [end] = cluster.model.tokenizer.encode(END)
        answer = await post(cluster, MESSAGES, **HI, stop_token_ids=[end])
        assert (answer["content"], answer["stop_reason"]) == ([], "end_turn")
        assert without_ids(rebuilt(await stream(cluster, stop_token_ids=[end]))) == without_ids(answer)

    run(scenario, Script(END))


def test_an_error_before_the_first_token_has_its_status_and_after_it_is_an_event() -> None:
    lost = ErrorInfo(code="engine_error", message="broken", http_status=500)
    said = {"type": "error", "error": {"type": "api_error", "message": "broken"}}

    async def before(cluster: FakeCluster) -> None:
        response = await cluster.client.post(MESSAGES, json={**HI, "stream": True})
        assert (response.status_code, response.json()) == (500, said)

    async def after(cluster: FakeCluster) -> None:
        prefill_node = cluster.service.machine.node_table.named(NodeId("n0"))
        assert prefill_node is not None
        cluster.script.fail_when = lambda: not any(prefill_node.pending.values())
        assert (await stream(cluster))[-1] == said

    run(before, Script(fail_with=lost, fail_times=99, fail_at="n0"))
    run(after, Script(fail_with=lost, fail_times=99, fail_at="n1"))


# ---------------------------------------------------------------- requests


def test_blocks_are_messages() -> None:
    text = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [text]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                text,
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": None}},
                {"type": "tool_use", "id": "2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "one"},
                {"type": "tool_result", "tool_use_id": "2", "content": [text], "is_error": False},
                {"type": "tool_result", "tool_use_id": "3"},
                text,
            ],
        },
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": []},
    ]
    part = {"type": "text", "text": "a"}
    assert chat_messages(messages) == [
        {"role": "user", "content": [part]},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": [part],
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": None}}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": [part]},
        {"role": "tool", "tool_call_id": "3", "content": ""},
        {"role": "user", "content": [part]},
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize("system", ["s", [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]])
def test_the_prompt_is_that_of_the_same_chat_and_is_counted(system: object) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    router().answer("/v1/chat/completions", {"messages": chat})
    prompt = router().last.prompt_token_ids
    router().answer(MESSAGES, {**HI, "system": system})
    assert router().last.prompt_token_ids == prompt
    counted = router().post(f"{MESSAGES}/count_tokens", {"messages": HI["messages"], "system": system})
    assert counted.json() == {"input_tokens": len(prompt)}


def test_output_config_has_the_grammar_of_the_same_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    chat = {"messages": HI["messages"], "stop_token_ids": [0]}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    router().answer("/v1/chat/completions", {**chat, "response_format": form})
    grammar = router().last.sampling.grammar
    assert grammar is not None
    body = {**HI, "stop_token_ids": [0], "output_config": {"format": {"type": "json_schema", "schema": schema}}}
    router().answer(MESSAGES, body)
    assert router().last.sampling.grammar == grammar


@pytest.mark.parametrize(
    "choice", [{"type": "none"}, {"type": "auto"}, {"type": "auto", "disable_parallel_tool_use": False}]
)
def test_tool_choices_that_any_model_can_have(choice: dict[str, Any]) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        [end] = cluster.model.tokenizer.encode(END)
        answer = await post(cluster, MESSAGES, **HI, stop_token_ids=[end], tools=FLAT_TOOLS, tool_choice=choice)
        calls = [block for block in answer["content"] if block["type"] == "tool_use"]
        assert len(calls) == (0 if choice["type"] == "none" else 2)

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes", reasoning_parser="think")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_tokens": None}, "max_tokens: is required"),
        ({"max_tokens": 0}, "max_tokens: should be 1 or more, not 0"),
        ({"messages": None}, "messages: is required"),
        ({"messages": []}, "messages: should have at least 1 items"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages.0.role: should be 'user', 'assistant' or 'system'",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content: should be a string or a list of blocks"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content.0: type 'image' is not supported: only text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "messages.0.content.0.tool_use_id: is required",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": "x"}]}
                ]
            },
            "messages.0.content.0.input: should be an object",
        ),
        ({"system": 3}, "system: should be a string or a list of blocks of text"),
        ({"system": [{"type": "image"}]}, "system.0: type 'image' is not supported"),
        ({"temperature": 3}, "temperature: should be 2 or less, not 3"),
        ({"stop_sequences": [""]}, "stop_sequences: should not be empty"),
        ({"thinking": {"type": "maybe"}}, "thinking.type: should be one of 'adaptive', "),
        (
            {"tools": [{"type": "web_search_20250305", "name": "w"}]},
            "tools.0: type 'web_search_20250305' is not supported",
        ),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema: is required"),
        (
            {"tools": [{"name": "f", "input_schema": 3}]},
            "tools.0: input_schema should be a JSON schema: an object, not 3",
        ),
        ({"tools": [{"name": "", "input_schema": {}}]}, "tools.0: name should be 1 to 128 letters"),
        (
            {"tool_choice": {"type": "maybe"}},
            "tool_choice.type: should be 'auto', 'any', 'tool' or 'none', not 'maybe'",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice: needs tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name: is required"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format: type 'xml' is not supported"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "strng"}}}},
            "output_config.format.schema: Invalid type: strng",
        ),
        ({"container": "c"}, "container: containers are not supported"),
        ({"mcp_servers": [{}]}, "mcp_servers: MCP servers are not supported"),
        ({"stop": ["a"]}, "stop_sequences: the field is called stop_sequences"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "prompt is too long: This model's maximum context"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name_here(body: dict[str, Any], said: str) -> None:
    response = router().post(MESSAGES, {**HI, **body})
    assert response.status_code == 400
    answer = response.json()
    assert (answer["type"], answer["error"]["type"]) == ("error", "invalid_request_error")
    assert answer["error"]["message"].startswith(said), answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", MESSAGES, 405, "invalid_request_error"),
        ("POST", f"{MESSAGES}/batches", 404, "not_found_error"),
        ("POST", f"{MESSAGES}/nothing", 404, "not_found_error"),
    ],
)
def test_errors_of_routing_are_anthropics(method: str, path: str, status: int, kind: str) -> None:
    response = router().request(method, path, json={})
    assert response.status_code == status
    assert (response.json()["type"], response.json()["error"]["type"]) == ("error", kind)


@pytest.mark.parametrize("path", [MESSAGES, f"{MESSAGES}/count_tokens"])
def test_unknown_models_are_404(path: str) -> None:
    response = router().post(path, {**HI, "model": "nobody"})
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"
