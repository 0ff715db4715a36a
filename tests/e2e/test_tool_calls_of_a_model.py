"""Tool calls over HTTP from a real model that knows no tools: valid, the same everywhere, and read by a client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from support.asking import Asker, play
from support.cluster import Cluster, running
from support.cluster_config import cluster_config, d, m, p
from support.tools import joined_chunks, without_ids

MODEL = Path(__file__).parents[2] / "models" / "demo"
QUESTION: list[Any] = [{"role": "user", "content": "The red key lies in box 417. Where is the red key?"}]
PLACE = {
    "type": "object",
    "properties": {
        "thing": {"enum": ["red key", "blue lamp"]},
        "box": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["thing", "box"],
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "open_box", "description": "Opens a box", "parameters": PLACE}},
    {"type": "function", "function": {"name": "look_around"}},
]
NAMED = {"type": "function", "function": {"name": "open_box"}}
WISHES: dict[str, dict[str, Any]] = {
    "required": {"tool_choice": "required"},
    "one": {"tool_choice": "required", "parallel_tool_calls": False},
    "named": {"tool_choice": NAMED},
    "sampled": {"tool_choice": "required", "temperature": 1.0},
    "either": {"response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}},
}

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", params=["mixed", "1p1d"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    nodes = (m(),) if request.param == "mixed" else (p(), d(speculative={"method": "ngram"}))
    with running(cluster_config(MODEL, *nodes, cache={"num_blocks": 512}, router={"tool_parser": "hermes"})) as cluster:
        yield cluster
        cluster.wait_until_quiescent()


FIRST: dict[str, Any] = {}


@pytest.mark.parametrize("name", WISHES)
def test_answers_are_valid_and_the_same_everywhere(cluster: Cluster, name: str) -> None:
    body = {"messages": QUESTION, "tools": TOOLS, "max_tokens": 2500, "temperature": 0.0, "seed": 7, **WISHES[name]}

    async def both(asker: Asker) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        whole = await asker.post("/v1/chat/completions", body)
        return whole.body, await asker.stream("/v1/chat/completions", body)

    whole, chunks = play(cluster, both)
    [choice] = whole["choices"]
    message = without_ids(choice["message"])
    streamed = joined_chunks(chunks)
    assert without_ids(streamed["message"]) == message
    assert streamed["finish_reason"] == choice["finish_reason"]
    calls = message.get("tool_calls", [])
    if name == "either" and not calls:
        jsonschema.validate(json.loads(message["content"]), PLACE)
    else:
        assert choice["finish_reason"] == "tool_calls"
        assert calls
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "open_box":
            jsonschema.validate(arguments, PLACE)
        else:
            assert (call["function"]["name"], arguments) == ("look_around", {})
    if name in ("one", "named"):
        assert len(calls) == 1
    if name == "named":
        assert calls[0]["function"]["name"] == "open_box"
    assert FIRST.setdefault(name, message) == message


def test_the_openai_package_reads_a_stream_and_goes_on_with_the_results(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="any", max_retries=0) as client:
        common: dict[str, Any] = {"model": "demo", "temperature": 1.0, "seed": 5, "max_tokens": 2500}
        with client.chat.completions.stream(messages=QUESTION, tools=TOOLS, tool_choice="required", **common) as stream:
            events = [event.type for event in stream]
            [choice] = stream.get_final_completion().choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls
        assert events.count("tool_calls.function.arguments.done") == len(choice.message.tool_calls)
        for call in choice.message.tool_calls:
            json.loads(call.function.arguments)
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "It is empty."} for call in choice.message.tool_calls
        ]
        messages = [*QUESTION, choice.message.model_dump(exclude_none=True, exclude={"parsed"}), *results]
        answer = client.chat.completions.create(messages=messages, tools=TOOLS, tool_choice="none", **common)
        assert answer.choices[0].message.content is not None
