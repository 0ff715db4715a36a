"""``/v1/responses``: what the body becomes, whole answers, and streams that say the same in OpenAI's order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import pytest
from fake_nodes import FakeCluster, Script
from instant_router import InstantRouter
from test_http_generation import post, run
from test_tool_calls import TOOLS, TWO_CALLS

from kvrelay.protocol.ids import NodeId, RequestId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.request import SamplingParams, TokenLogprobs
from router.events import NewRequest
from router.openai.answer import AnswerHead
from router.openai.choice import Choice, Delta
from router.openai.errors import AnswerError
from router.openai.json_pieces import PIECE_BYTES
from router.responses.items import chat_messages
from router.responses.writer import ResponseWriter
from router.text.output_text import TextOptions

RESPONSES = "/v1/responses"
END = "\x00"
FUNCTIONS: list[Any] = [tool["function"] for tool in TOOLS]
FLAT_TOOLS = [{"type": "function", **function} for function in FUNCTIONS]
NO_ITEM: dict[str, Any] = {"type": "message", "role": "assistant", "status": "completed"}


@cache
def router() -> InstantRouter:
    return InstantRouter()


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def without_ids(value: Any) -> Any:
    """Return ``value`` without ids: they differ between equal answers."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if not isinstance(value, dict):
        return value
    dropped = ("id", "item_id", "call_id", "created_at", "sequence_number")
    return {name: without_ids(item) for name, item in value.items() if name not in dropped}


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, whose names and numbers must be right."""
    events = []
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def rebuilt(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the response that a client makes of the events, which must come in OpenAI's order."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"] == events[1]["response"]
    assert events[0]["response"]["status"] == "in_progress"
    items: list[dict[str, Any]] = []
    is_open = False
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert not is_open
            assert event["output_index"] == len(items)
            items.append(event["item"])
            is_open = True
            assert event["item"]["status"] == "in_progress"
            continue
        item = items[event["output_index"]]
        assert is_open
        assert event["output_index"] == len(items) - 1
        if kind == "output_item.done":
            assert event["item"]["id"] == item["id"]
            assert without_status(event["item"]) == without_status(item)
            items[-1] = event["item"]
            is_open = False
            continue
        assert event["item_id"] == item["id"]
        if kind == "content_part.added":
            assert item["content"] == []
            item["content"].append(event["part"])
        elif kind == "content_part.done":
            assert item["content"] == [event["part"]]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (event["arguments"], event["name"]) == (item["arguments"], item["name"])
        else:
            kind, _, what = kind.rpartition(".")
            [part] = item["content"]
            assert part["type"] == kind
            if what == "delta":
                part["text"] += event["delta"]
                if kind == "output_text":
                    part["logprobs"] += event["logprobs"]
            else:
                assert what == "done"
                assert event["text"] == part["text"]
    assert not is_open
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    assert last["output"] == items
    assert last["id"] == events[0]["response"]["id"]
    return dict(last)


def without_status(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "status"}


def streamed(body: dict[str, Any]) -> dict[str, Any]:
    response = router().post(RESPONSES, {**body, "stream": True})
    assert response.status_code == 200, response.text
    return rebuilt(events_of(response.text))


async def stream(cluster: FakeCluster, **body: object) -> list[dict[str, Any]]:
    response = await cluster.client.post(RESPONSES, json={"model": "demo", "seed": 0, "stream": True, **body})
    assert response.status_code == 200, response.text
    return events_of(response.text)


# ---------------------------------------------------------------- answers


def test_a_response_of_text() -> None:
    body = {"input": "hi", "max_output_tokens": 2, "metadata": {"a": "b"}, "temperature": 0.5, "user": "u"}
    answer = router().post(RESPONSES, body).json()
    assert answer["id"].startswith("resp_")
    assert (answer["object"], answer["model"]) == ("response", "demo")
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert without_ids(answer["output"]) == [{**NO_ITEM, "status": "incomplete", "content": [text_part("bc")]}]
    assert answer["usage"] == {
        "input_tokens": len("user: hi\nassistant: "),
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len("user: hi\nassistant: ") + 2,
    }
    echoed = {name: answer[name] for name in ("max_output_tokens", "metadata", "temperature", "user", "store", "tools")}
    assert echoed == {
        "max_output_tokens": 2,
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "user": "u",
        "store": False,
        "tools": [],
    }
    assert without_ids(streamed(body)) == without_ids(answer)
    assert router().last.sampling.temperature == 0.5


@pytest.mark.parametrize(
    "body",
    [
        {"input": "hi"},
        {"instructions": "be brief"},
        {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"input": "hi", "text": {"format": {"type": "text"}}, "include": ["reasoning.encrypted_content"]},
    ],
)
def test_stream_and_answer_are_the_same(body: dict[str, Any]) -> None:
    whole = router().post(RESPONSES, body).json()
    assert without_ids(streamed(body)) == without_ids(whole)
    [part] = whole["output"][0]["content"]
    assert len(part["logprobs"]) == (4 if "top_logprobs" in body else 0)
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])


def test_reasoning_and_calls_are_items_whole_and_streamed() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        [end] = cluster.model.tokenizer.encode(END)
        body = {"input": "hi", "stop_token_ids": [end], "tools": FLAT_TOOLS, "max_output_tokens": 400}
        answer = await post(cluster, RESPONSES, **body)
        weather = {"name": "weather", "arguments": '{"place": "Žilina"}'}
        assert answer["status"] == "completed"
        assert without_ids(answer["output"]) == [
            {
                "type": "reasoning",
                "status": "completed",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Both."}],
            },
            {**NO_ITEM, "content": [text_part("I look.")]},
            {"type": "function_call", "status": "completed", **weather},
            {"type": "function_call", "status": "completed", "name": "now", "arguments": "{}"},
        ]
        assert len({item["id"] for item in answer["output"]}) == 4
        assert answer["tools"] == FLAT_TOOLS
        details = answer["usage"]["output_tokens_details"]
        assert details["reasoning_tokens"] == len("Both.")  # this tokenizer has a token for each byte
        assert without_ids(rebuilt(await stream(cluster, **body))) == without_ids(answer)

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes", reasoning_parser="think")


def test_a_call_that_is_cut_off_is_incomplete() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = {"input": "hi", "tools": FLAT_TOOLS, "max_output_tokens": TWO_CALLS.index("lina")}
        answer = await post(cluster, RESPONSES, **body)
        assert [item["status"] for item in answer["output"]] == ["completed", "completed", "incomplete"]
        assert answer["status"] == "incomplete"
        assert without_ids(rebuilt(await stream(cluster, **body))) == without_ids(answer)

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes", reasoning_parser="think")


def test_an_output_without_text_is_an_empty_message() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        [end] = cluster.model.tokenizer.encode(END)
        body = {"input": "hi", "stop_token_ids": [end]}
        answer = await post(cluster, RESPONSES, **body)
        assert without_ids(answer["output"]) == [{**NO_ITEM, "content": [text_part("")]}]
        assert without_ids(rebuilt(await stream(cluster, **body))) == without_ids(answer)

    run(scenario, Script(END))


def test_an_error_before_the_first_token_has_its_status_and_after_it_is_an_event() -> None:
    lost = ErrorInfo(code="engine_error", message="broken", http_status=500)

    async def before(cluster: FakeCluster) -> None:
        response = await cluster.client.post(RESPONSES, json={"input": "hi", "stream": True})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_error"

    async def after(cluster: FakeCluster) -> None:
        prefill_node = cluster.service.machine.node_table.named(NodeId("n0"))
        assert prefill_node is not None
        cluster.script.fail_when = lambda: not any(prefill_node.pending.values())
        events = await stream(cluster, input="hi")
        assert events[-1]["type"] == "response.failed"
        failed = events[-1]["response"]
        assert failed["status"] == "failed"
        assert failed["error"] == {"code": "server_error", "message": "broken"}

    run(before, Script(fail_with=lost, fail_times=99, fail_at="n0"))
    run(after, Script(fail_with=lost, fail_times=99, fail_at="n1"))


# ---------------------------------------------------------------- requests


def test_items_are_messages() -> None:
    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "content": [text_part("I look."), {"type": "refusal", "refusal": "no"}],
        },
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {
            "type": "function_call",
            "call_id": "2",
            "name": "g",
            "arguments": '{"x": 1}',
            "id": "fc",
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"type": "reasoning", "summary": []},
    ]
    assert chat_messages(items) == [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": [{"type": "text", "text": "I look."}, {"type": "text", "text": "no"}],
            "tool_calls": [call("1", "f", {}), call("2", "g", {"x": 1})],
        },
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "reasoning_content": "so", "tool_calls": [call("3", "f", {})]},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]


def call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_the_prompt_is_that_of_the_same_chat() -> None:
    router().answer(
        "/v1/chat/completions", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    )
    prompt = router().last.prompt_token_ids
    router().answer(RESPONSES, {"instructions": "s", "input": "u"})
    assert router().last.prompt_token_ids == prompt
    counted = router().post("/v1/responses/input_tokens", {"instructions": "s", "input": "u", "model": "demo"})
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": len(prompt)}


def test_a_structured_response_has_the_grammar_of_the_same_chat() -> None:
    router_ = router()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"name": "n", "schema": schema, "strict": True}
    chat = {"messages": [{"role": "user", "content": "hi"}], "stop_token_ids": [0]}
    router_.answer("/v1/chat/completions", {**chat, "response_format": {"type": "json_schema", "json_schema": form}})
    grammar = router_.last.sampling.grammar
    assert grammar is not None
    body = {"input": "hi", "stop_token_ids": [0], "text": {"format": {"type": "json_schema", **form}}}
    assert router_.post(RESPONSES, body).json()["text"]["format"] == {"type": "json_schema", **form}
    assert router_.last.sampling.grammar == grammar


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": 3}, "input", "input: should be a string or a list of items"),
        ({"input": ["a"]}, "input", "input.0: should be an object"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input", "input.0.role: should be 'user', 'assistant'"),
        ({"input": [{"role": "user"}]}, "input", "input.0.content: should be a string or a list of parts"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input",
            "input.0.content.0: type 'input_image' is not supported: only text is",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input",
            "input.0.content.0.text: is required",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "input.0.arguments: is required"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "input.0.call_id: is required"),
        (
            {"input": [{"type": "function_call", "name": "f", "arguments": "{", "call_id": "c"}]},
            "input",
            "input.0.arguments: should be a JSON object in a string",
        ),
        ({"input": [{"type": "item_reference", "id": "m"}]}, "input", "input.0: answers are not stored"),
        ({"input": [{"type": "web_search_call"}]}, "input", "input.0: type 'web_search_call' is not supported"),
        (
            {"input": "a", "previous_response_id": "resp_1"},
            "previous_response_id",
            "previous_response_id: answers are not",
        ),
        ({"input": "a", "conversation": "c"}, "conversation", "conversation: answers are not stored"),
        ({"input": "a", "store": "true"}, "store", "store: should be true or false"),
        (
            {"input": "a", "prompt_cache_options": {"prewarm": True}},
            "prompt_cache_options",
            "prompt_cache_options: prewarm is not supported",
        ),
        ({"input": "a", "personality": "friendly"}, "personality", "personality: there are no styles to choose from"),
        ({"input": "a", "background": True}, "background", "background: answers are not made in the background"),
        ({"input": "a", "truncation": "left"}, "truncation", "truncation: should be 'auto' or 'disabled'"),
        ({"input": "a", "include": ["x"]}, "include", "include: 'x' is not supported"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens: should be 1 or more, not 0"),
        ({"input": "a", "temperature": 3}, "temperature", "temperature: should be 2 or less, not 3"),
        ({"input": "a", "metadata": {"a": 1}}, "metadata", "metadata.a: should be a string, not 1"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools", "tools.0: type 'web_search' is not supported"),
        ({"input": "a", "tools": [{"type": "function"}]}, "tools", "tools.0: name should be 1 to 128 letters"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice", "tool_choice: needs tools"),
        ({"input": "a", "tool_choice": {"type": "mcp"}}, "tool_choice", "tool_choice: type 'mcp' is not supported"),
        ({"input": "a", "text": {"verbosity": "terse"}}, "text", "text.verbosity: should be 'low', 'medium' or 'high'"),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, "text", "text.format: type 'xml' is not supported"),
        (
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "strng"}}}},
            "text",
            "text.format.schema: Invalid type: strng",
        ),
        ({"input": "a", "messages": [{"role": "user"}]}, "input", "input: the field is called input"),
        ({"input": "a", "max_tokens": 3}, "max_tokens", "max_tokens: the field is called max_output_tokens"),
        ({"input": "x" * 600}, "input", "This model's maximum context length is 512 tokens."),
    ],
)
def test_what_is_wrong_is_refused_by_its_name_here(body: dict[str, Any], param: str, said: str) -> None:
    response = router().post(RESPONSES, body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(said), error["message"]


def test_logprobs_are_refused_where_the_output_is_parsed() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        response = await cluster.client.post(RESPONSES, json={"input": "a", "tools": FLAT_TOOLS, "top_logprobs": 1})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "include"

    run(scenario, tool_parser="hermes")


def test_logprobs_of_tokens_without_text_come_with_the_next_text() -> None:
    """Bytes of a character are no text before its last one."""

    async def scenario(cluster: FakeCluster) -> None:
        body = {"input": "a", "max_output_tokens": 16, "include": ["message.output_text.logprobs"]}
        answer = rebuilt(await stream(cluster, **body))
        [part] = answer["output"][0]["content"]
        assert "🦊" in part["text"]
        assert len(part["logprobs"]) == 16

    run(scenario, Script(answer="a🦊b" * 3, in_step=True))


@pytest.mark.parametrize("how", ["stream", "whole", "failed"])
def test_long_logprobs_are_written_in_pieces(how: str) -> None:
    """Together they were a single one, four times as long, which took the loop almost a second for 32,000 tokens."""
    count = 400
    model = router().service.model
    request = NewRequest(RequestId("r"), [1], SamplingParams(max_tokens=count, seed=0))
    choice = Choice(0, 0, request, model.tokenizer.token_bytes, TextOptions())
    writer = ResponseWriter(
        AnswerHead("resp_r", 1, "m"), choice, b'{"user":null}', model.tokenizer.token_bytes, with_logprobs=True
    )
    entry = TokenLogprobs(-0.123456789, list(range(65, 85)), [-1.23456789] * 20)

    async def deltas() -> AsyncIterator[Delta]:
        for index in range(count):
            if how == "failed" and index == count - 1:
                raise AnswerError(ErrorInfo(code="engine_error", message="broken"))
            yield Delta(0, "a", [65], [entry], finish_reason="length" if index == count - 1 else None)

    async def pieces() -> list[bytes]:
        return await writer.full(deltas()) if how == "whole" else [item async for item in writer.events(deltas())]

    found = asyncio.run(pieces())
    whole = b"".join(found).decode()
    answer = json.loads(whole) if how == "whole" else events_of(whole)[-1]["response"]
    [part] = answer["output"][0]["content"]
    assert len(part["logprobs"]) == len(part["text"]) == count - (how == "failed")
    if how == "stream":
        rebuilt(events_of(whole))
    assert max(map(len, found)) < 2 * PIECE_BYTES < len(json.dumps(part["logprobs"]))


def test_a_long_body_is_prepared_in_a_worker_and_says_the_same() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        [end] = cluster.model.tokenizer.encode(END)
        tools = [{**tool, "description": "d" * 20_000} for tool in FLAT_TOOLS]
        body = {"input": "hi", "tools": tools, "instructions": None, "stop_token_ids": [end], "max_output_tokens": 400}
        answer = await post(cluster, RESPONSES, **body)
        assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call", "function_call"]
        assert answer["tools"] == tools
        assert without_ids(rebuilt(await stream(cluster, **body))) == without_ids(answer)

    run(scenario, Script(TWO_CALLS + END), tool_parser="hermes", reasoning_parser="think")
