"""Protocol between the router and its preparation workers, over a worker's standard input and output.

Each message is preceded by its length in four bytes, little-endian. The first message to a worker is the ``model`` and
``engine`` sections of the config and the formats of the model's output, as JSON. Each ``Job`` after it is answered by
one ``Reply``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from kvrelay.errors import PreparationError
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.token_rules import TokenRules
from router.openai.structured import Structure
from router.preparation import Job

T = TypeVar("T")

LENGTH = struct.Struct("<I")

WORKER_SETTINGS: dict[str, Any] = {"model": True, "engine": True, "router": {"tool_parser", "reasoning_parser"}}
"""The part of the config that a worker gets."""


class Generate(msgspec.Struct, frozen=True, tag=True):
    """A generation request. ``request`` is JSON; ``prompts`` are lists of integers, decoded one by one."""

    request: bytes
    prompts: list[msgspec.Raw]
    texts: list[str] | None
    structure: Structure | None = None
    echo: bytes = b""
    rules: TokenRules | None = None


class Answer(msgspec.Struct, frozen=True, tag=True):
    """The JSON of a complete response."""

    body: bytes


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """The request cannot be served."""

    error: ErrorInfo
    param: str | None


class Reply(msgspec.Struct, frozen=True):
    """Result of a job. ``unknown_fields``: names of unknown fields that this worker has not reported before."""

    outcome: Generate | Answer | Refusal
    unknown_fields: list[str]


def _reader(kind: type[T]) -> Callable[[bytes], T]:
    """Return what reads a ``kind``. It raises PreparationError if that is damaged."""
    decoder = msgspec.msgpack.Decoder(kind)

    def read(data: bytes) -> T:
        try:
            return decoder.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: text that is not UTF-8
            raise PreparationError(f"a {kind.__name__} of a preparation worker cannot be read: {error}") from error

    return read


encode = msgspec.msgpack.Encoder().encode
decode_job = _reader(Job)
decode_reply = _reader(Reply)
decode_prompt = _reader(list[int])


def framed(message: bytes) -> bytes:
    """Return ``message`` preceded by its length."""
    return LENGTH.pack(len(message)) + message
