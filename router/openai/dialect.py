"""What the dialects that are not OpenAI's chat completions share: each request becomes a chat request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from kvrelay.errors import InvalidRequestError
from router.openai.schemas import ChatCompletionRequest, GenerationFields, parse

EXTRA_FIELDS = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "chat_template_kwargs",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "priority",
        "repetition_penalty",
        "seed",
        "skip_special_tokens",
        "stop_token_ids",
        "structured_outputs",
        "top_k",
    }
)
"""Fields of chat completions that every dialect has under the same name."""

PROMPT_FIELDS = frozenset({"chat_template_kwargs", "model"})
"""Those of them that count where only the number of tokens is asked for."""


class Reading(NamedTuple):
    """A request that was read. ``echo``: what the answer repeats of the body, as the dialect's writer expects it."""

    request: GenerationFields
    echo: bytes = b""


def chat_request(body: Mapping[str, Any], copied: Iterable[str], fields: Mapping[str, object]) -> ChatCompletionRequest:
    """Return the chat request with ``fields`` and, from ``body``, those named in ``copied``.

    Raises InvalidRequestError that names fields of chat completions: what an error names is renamed when it is sent.
    """
    chosen = {name: body[name] for name in copied if name in body}
    return parse(ChatCompletionRequest, chosen | {name: value for name, value in fields.items() if value is not None})


def refuse(path: str, reason: str) -> NoReturn:
    """Raise InvalidRequestError for the value at ``path`` of a body."""
    raise InvalidRequestError(f"{path}: {reason}", param=path.partition(".")[0])


def text_at(value: object, path: str) -> str:
    """Return ``value`` if it is a string. Raises InvalidRequestError."""
    if not isinstance(value, str):
        refuse(path, "should be a string" if value is not None else "is required")
    return value


def object_at(value: object, path: str) -> dict[str, Any]:
    """Return ``value`` without nulls if it is an object. Raises InvalidRequestError."""
    if not isinstance(value, dict):
        refuse(path, "should be an object")
    return {name: item for name, item in value.items() if item is not None}


def list_at(value: object, path: str) -> list[Any]:
    """Return ``value`` if it is a list. Raises InvalidRequestError."""
    if not isinstance(value, list):
        refuse(path, "should be a list")
    return value
