"""Long answers as JSON in pieces: nothing copies them as a whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from instant_router import InstantRouter

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import PromptLogprobs, SamplingParams, TokenLogprobs
from router.events import NewRequest
from router.openai.answer import Answer, AnswerHead
from router.openai.chat import ChatStyle
from router.openai.choice import Choice, Delta
from router.openai.completions import CompletionStyle
from router.openai.json_pieces import PIECE_BYTES, JsonItems, JsonPieces, object_pieces
from router.openai.schemas import ChatCompletionRequest, CompletionRequest
from router.text.output_text import TextOptions

MODEL = InstantRouter().service.model
NUM_PIECES, PER_PIECE = 40, 500


def test_an_object_with_long_values_is_the_same_json() -> None:
    items = JsonItems()
    for index in range(3000):
        items.add([index, {"text": "é" * 30}])
        items.add([])
    pieces = object_pieces(
        {"b": 1, "long": JsonPieces([b"[", *items.pieces, b"]"]), "a": "x", "c": JsonPieces([b"{}"])}
    )
    expected = [item for index in range(3000) for item in (index, {"text": "é" * 30})]
    assert json.loads(b"".join(pieces)) == {"b": 1, "a": "x", "long": expected, "c": {}}
    assert max(map(len, pieces)) < 2 * PIECE_BYTES
    assert object_pieces({"only": JsonPieces([b"1"])}) == [b'{"only":1}']
    assert object_pieces({"a": 1}) == [b'{"a":1}']


async def _deltas(num_choices: int) -> AsyncIterator[Delta]:
    """Yield the logprobs of a long prompt and of some output, for each choice."""
    for index in range(num_choices):
        for number in range(NUM_PIECES):
            await asyncio.sleep(0)
            ids = np.arange(PER_PIECE, dtype="<i4") % 200
            values = np.linspace(-9, -1, PER_PIECE, dtype="<f8")
            start = 1 + number * PER_PIECE
            yield Delta(
                index, "", [], prompt_logprobs=PromptLogprobs(start, 0, ids.tobytes(), ids.tobytes(), values.tobytes())
            )
        yield Delta(index, "ab", [97, 98], [TokenLogprobs(-0.5, [], [])] * 2)
        yield Delta(index, "", [], finish_reason="length")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_no_piece_of_an_answer_is_long(api: str) -> None:
    prompt = [97] * (1 + NUM_PIECES * PER_PIECE)
    sampling = SamplingParams(max_tokens=2, seed=0)
    choices = [
        Choice(n, 0, NewRequest(RequestId(str(n)), prompt, sampling), MODEL.tokenizer.token_bytes, TextOptions())
        for n in range(2)
    ]
    request: Any
    style: Any
    if api == "chat":
        messages = [{"role": "user", "content": "a"}]
        request = ChatCompletionRequest(messages=messages, logprobs=True, prompt_logprobs=0)  # type: ignore[arg-type]
        style = ChatStyle(MODEL.tokenizer.token_bytes, request)
    else:
        request = CompletionRequest(prompt="a", echo=True, logprobs=0, prompt_logprobs=0)
        style = CompletionStyle(MODEL, request, choices, None)
    pieces = asyncio.run(Answer(AnswerHead("x", 1, "demo"), style, choices, request).full(_deltas(2)))
    assert max(map(len, pieces)) < 3 * PIECE_BYTES
    answer = json.loads(b"".join(pieces))
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    for choice in answer["choices"]:
        of_prompt = answer["prompt_logprobs"] if api == "chat" else choice["prompt_logprobs"]
        assert of_prompt[0] is None
        assert len(of_prompt) == len(prompt)
        if api == "chat":
            assert len(choice["logprobs"]["content"]) == 2
        else:
            assert {len(values) for values in choice["logprobs"].values()} == {len(prompt) + 2}
