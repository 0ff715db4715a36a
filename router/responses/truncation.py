"""``truncation: "auto"``: the oldest turns of a conversation that is too long are left out."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import suppress

from kvrelay.errors import PromptTooLongError
from router.model import ServedModel
from router.openai.chat import chat_prompt
from router.openai.schemas import ChatCompletionRequest

_ROOM = 8
"""Without ``max_output_tokens``, one of so many tokens of the model's length is kept for the output."""


def prompt_that_fits(request: ChatCompletionRequest, model: ServedModel, max_model_len: int) -> list[int]:
    """Return the token ids of the chat without its oldest turns, as few as leave room for the output.

    A turn is a message of the user and what follows it. System messages at the beginning stay, and so does the last
    turn, even if it is too long. Raises what ``chat_prompt`` raises.
    """
    first = next((n for n, message in enumerate(request.messages) if message.role not in ("system", "developer")), 0)
    starts = [n for n, message in enumerate(request.messages) if n == first or (n > first and message.role == "user")]
    longest = max_model_len - _room(request, max_model_len)

    def prompt(start: int) -> list[int]:
        messages = request.messages[:first] + request.messages[start:]
        return chat_prompt(request.model_copy(update={"messages": messages}), model, max_model_len)

    def fits(start: int) -> bool:
        try:
            return len(prompt(start)) <= longest
        except PromptTooLongError:
            return False

    with suppress(PromptTooLongError):
        whole = prompt(starts[0])  # most conversations fit: they are rendered once
        if len(whole) <= longest:
            return whole
    fitting = bisect_left(starts, True, 1, key=fits)
    return prompt(starts[min(fitting, len(starts) - 1)])


def _room(request: ChatCompletionRequest, max_model_len: int) -> int:
    """Return how many tokens the output may have at least: at most half of the model's length."""
    return min(request.max_completion_tokens or max(1, max_model_len // _ROOM), max_model_len // 2)
