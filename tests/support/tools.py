"""Requests with tools drawn from a seed, in the formats of several models, and their answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jsonschema
import msgspec

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import FinishReason, SamplingParams
from router.events import NewRequest, TokensDelivered
from router.model import ServedModel
from router.openai.answer import AnswerHead, Writer
from router.openai.chat import ChatCompletions
from router.openai.choice import Choice, Delta
from router.openai.sampling import text_options
from router.openai.schemas import ChatCompletionRequest, parse
from router.text.plain_tokenizer import plain_tokenizer
from router.tools.formats import FAMILIES
from support.schemas import END, VOCAB_SIZE, drawn_schema


def model_of(family: str | None, *, reasons: bool = False) -> ServedModel:
    """Return a model with plain tokens whose calls are in the format of ``family``."""
    return ServedModel(
        name="demo",
        root="demo",
        tokenizer=plain_tokenizer(VOCAB_SIZE),
        vocab_size=VOCAB_SIZE,
        max_model_len=4096,
        eos_token_ids=(END,),
        tool_family=None if family is None else FAMILIES[family],
        reasons=reasons,
    )


def drawn_request(seed: int) -> ChatCompletionRequest:
    """Return a request whose answer must have calls: one or several, of any tool or of a named one."""
    rng = random.Random(seed)
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": f"tool-{number}", "parameters": drawn_schema(seed * 10 + number)}}
        for number in range(1 + seed % 3)
    ]
    named = {"type": "function", "function": {"name": rng.choice(tools)["function"]["name"]}}
    body = {
        "messages": [{"role": "user", "content": f"question {seed}"}],
        "tools": tools,
        "tool_choice": named if seed % 4 == 3 else "required",
        "parallel_tool_calls": seed % 2 == 0,
    }
    return parse(ChatCompletionRequest, body)


class Answering:
    """Writes the answers to one request from output tokens, in whole and as a stream, as the router does."""

    def __init__(self, model: ServedModel, request: ChatCompletionRequest) -> None:
        self._model = model
        self._request = request
        self._api = ChatCompletions(model)

    def whole(self, token_ids: Sequence[int], finish_reason: FinishReason) -> dict[str, Any]:
        """Return the choice of the answer that is not a stream."""

        async def write() -> bytes:
            choice = self._choice()
            return b"".join(await self._answer(choice).full(_deltas(choice, [token_ids], finish_reason)))

        [choice] = msgspec.json.decode(asyncio.run(write()))["choices"]
        found: dict[str, Any] = choice
        return found

    def streamed(self, steps: Sequence[Sequence[int]], finish_reason: FinishReason) -> dict[str, Any]:
        """Return the choice that a client makes of a stream to which each of ``steps`` adds tokens."""

        async def write() -> list[bytes]:
            choice = self._choice()
            return [event async for event in self._answer(choice).events(_deltas(choice, steps, finish_reason))]

        events = asyncio.run(write())
        chunks = [msgspec.json.decode(event.removeprefix(b"data: ")) for event in events[:-1]]
        return joined_chunks(chunks)

    def _choice(self) -> Choice:
        prompt = [65]
        new = NewRequest(RequestId("r"), prompt, SamplingParams(max_tokens=4000, seed=0), 0, "", "r")
        parsing = self._api.parsing(self._request)
        assert parsing is not None
        tokens = self._model.tokenizer.token_bytes
        return Choice(0, 0, new, tokens, text_options(self._request, parsing.shown_ids), parsing.parser(prompt))

    def _answer(self, choice: Choice) -> Writer:
        return self._api.writer(AnswerHead("chatcmpl-1", 0, "demo"), self._request, [choice], None, b"")


async def _deltas(choice: Choice, steps: Sequence[Sequence[int]], finish_reason: FinishReason) -> AsyncIterator[Delta]:
    for number, step in enumerate(steps, 1):
        last = finish_reason if number == len(steps) else None
        yield choice.take(TokensDelivered(list(step), finish_reason=last))


def joined_chunks(chunks: Sequence[Any]) -> dict[str, Any]:
    """Return the choice that a client makes of a stream with one, and check the form of each chunk."""
    message: dict[str, Any] = {"refusal": None}
    calls: list[dict[str, Any]] = []
    finish_reason = None
    for chunk in chunks:
        [choice] = chunk["choices"]
        delta = choice["delta"]
        assert ("role" in delta) == (chunk is chunks[0])
        assert finish_reason is None
        finish_reason = choice["finish_reason"]
        for name in ("role", "content", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for item in delta.get("tool_calls", ()):
            if item["index"] == len(calls):
                assert list(item) == ["index", "id", "type", "function"]
                assert item["function"]["arguments"] == ""
                calls.append({"id": item["id"], "type": "function", "function": {**item["function"]}})
            else:
                assert item["index"] == len(calls) - 1
                assert list(item) == ["index", "function"]
                assert list(item["function"]) == ["arguments"]
                calls[-1]["function"]["arguments"] += item["function"]["arguments"]
        assert not (calls and finish_reason) or delta == {}
    assert finish_reason is not None
    if calls:
        message |= {"tool_calls": calls, "content": message["content"] or None}
    return {"message": message, "finish_reason": finish_reason}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with calls without their ids, which must differ."""
    calls = message.get("tool_calls")
    ids = [call["id"] for call in calls or ()]
    assert len(set(ids)) == len(ids)
    assert all(len(call_id) >= 9 for call_id in ids)
    unnamed = [{"type": call["type"], "function": call["function"]} for call in calls or ()]
    return message | {"tool_calls": unnamed} if calls else message


def check_calls(request: ChatCompletionRequest, choice: dict[str, Any]) -> None:
    """Fail unless ``choice`` has nothing but valid calls, as many as ``request`` allows."""
    assert choice["finish_reason"] == "tool_calls", choice
    calls = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None
    use = request.tool_use
    assert use is not None
    assert 1 <= len(calls) <= (16 if use.parallel else 1)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in use.tools}
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.Draft202012Validator(schemas[call["function"]["name"]]).validate(arguments)
