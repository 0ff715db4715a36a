"""``truncation`` of ``/v1/responses``: what is left of a conversation that is too long."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from instant_router import InstantRouter

from router.model import ServedModel
from router.openai.chat import chat_prompt
from router.openai.schemas import ChatFields
from router.responses import truncation

RESPONSES = "/v1/responses"
LENGTH = 512
"""The model's length; a character is a token."""

TURN = [{"role": "user", "content": "u" * 60}, {"role": "assistant", "content": "a" * 60}]
LAST = {"role": "user", "content": "z" * 60}


@cache
def router() -> InstantRouter:
    return InstantRouter()


def prompt(items: list[dict[str, Any]], **fields: Any) -> list[int]:
    """Return the prompt that is sent for a conversation."""
    router().answer(RESPONSES, {"input": items, "instructions": "be brief", **fields})
    return router().last.prompt_token_ids


def numbered(count: int) -> list[dict[str, Any]]:
    """Return ``count`` turns that differ, and a last message."""
    turns = [[TURN[0] | {"content": f"{n:060}"}, TURN[1]] for n in range(count)]
    return [message for turn in turns for message in turn] + [LAST]


def rendered(items: list[dict[str, Any]]) -> list[int]:
    """Return the prompt of a conversation, however long it is."""
    messages = [{"role": "system", "content": "be brief"}, *items]
    tokens: list[int] = router().post("/tokenize", {"messages": messages}).json()["tokens"]
    return tokens


@pytest.mark.parametrize(("max_output_tokens", "room"), [(None, 64), (30, 30), (200, 200), (100_000, 256)])
def test_auto_leaves_out_as_few_of_the_oldest_turns_as_make_room_for_the_output(
    max_output_tokens: int | None, room: int
) -> None:
    items = numbered(6)
    from_each_turn = [rendered(items[first:]) for first in range(0, len(items), 2)]
    longest = next(tokens for tokens in from_each_turn if len(tokens) <= LENGTH - room)
    assert longest is not from_each_turn[0]
    assert prompt(items, truncation="auto", max_output_tokens=max_output_tokens) == longest


def test_what_fits_is_left_as_it_is() -> None:
    assert prompt(numbered(1), truncation="auto") == prompt(numbered(1)) == prompt(numbered(1), truncation="disabled")


def test_what_fits_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was rendered and tokenized once more for each doubling of the number of turns."""
    rendered: list[int] = []

    def counted(fields: ChatFields, model: ServedModel, max_model_len: int | None = None) -> list[int]:
        rendered.append(len(fields.messages))
        return chat_prompt(fields, model, max_model_len)

    monkeypatch.setattr(truncation, "chat_prompt", counted)
    items = [{"role": role, "content": "a"} for role in ("user", "assistant") * 10]
    prompt([*items, LAST], truncation="auto")
    assert rendered == [22]


def test_messages_of_the_system_at_the_beginning_stay() -> None:
    system = {"role": "developer", "content": "answer in verse"}
    assert prompt([system, *numbered(6)], truncation="auto") == prompt([system, *numbered(6)[-5:]])


def test_the_results_of_tools_stay_with_their_turn() -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}
    result = {"type": "function_call_output", "call_id": "c", "output": "r" * 60}
    items = [LAST | {"content": "x" * 300}, call, result, LAST]
    assert prompt(items, truncation="auto") == prompt([LAST])


def test_a_last_turn_that_is_too_long_is_refused() -> None:
    body = {"input": [*numbered(3), {"role": "user", "content": "x" * 600}], "truncation": "auto"}
    error = router().post(RESPONSES, body).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


def test_a_last_turn_that_leaves_little_room_is_answered() -> None:
    last = {"role": "user", "content": "x" * 470}
    assert prompt([*numbered(3), last], truncation="auto", max_output_tokens=200) == prompt([last])


def test_the_answer_says_what_was_asked_for() -> None:
    for value in ("auto", "disabled"):
        assert router().answer(RESPONSES, {"input": "a", "truncation": value})["truncation"] == value
