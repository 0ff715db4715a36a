"""Leaves the clients' texts out of what is recorded: tokens, and whatever follows from them alone."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import msgspec

SECRET = frozenset(
    {
        # tokens
        "prompt_token_ids",
        "output_token_ids",
        "token_ids",
        "stop_token_id",
        "stop_token_ids",
        "logit_bias",
        "token_rules",
        "drafts",
        # probabilities: whoever has the model finds the tokens
        "logprobs",
        "prompt_logprobs",
        # digests: who guesses the tokens can be sure
        "added",
        "removed",
        "block_hashes",
        "digest",
        # all of a message
        "encoded",
        # texts of the client
        "text",
        "session",
    }
)
"""Fields of events and messages that hold, or betray, what clients wrote and got; all that is in them is secret."""


def without_prompts(value: Any) -> Any:
    """Return ``value``, an event or a part of one, with stand-ins for all secret fields: zeros, as many as there were.

    What a machine would do with it is another question: it is for reading only.
    """
    return _map(value, secret=False)


def _map(value: Any, *, secret: bool) -> Any:
    if isinstance(value, msgspec.Struct):
        changes = {name: _map(getattr(value, name), secret=secret or name in SECRET) for name in _fields(value)}
        return msgspec.structs.replace(value, **changes)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {name: _map(getattr(value, name), secret=secret or name in SECRET) for name in _fields(value)}
        return dataclasses.replace(value, **changes)
    if isinstance(value, list):
        return [_map(item, secret=secret) for item in value]
    if type(value) is tuple:
        return tuple(_map(item, secret=secret) for item in value)
    if isinstance(value, dict):
        return {} if secret else {key: _map(item, secret=False) for key, item in value.items()}
    return _stand_in(value) if secret else value


def _fields(value: Any) -> list[str]:
    if isinstance(value, msgspec.Struct):
        return list(value.__struct_fields__)
    return [field.name for field in dataclasses.fields(value)]


def _stand_in(value: Any) -> Any:
    match value:
        case None | bool() | Enum():
            return value
        case int() | float():
            return type(value)(0)
        case bytes():
            return bytes(len(value))
        case str():
            return ""
    raise TypeError(f"no stand-in for a secret of type {type(value).__name__}")
