"""What the router and its preparation workers say to each other, over a worker's standard input and output.

Each message is its length in four bytes and then itself. The first tells the worker what to serve: the ``model`` and
``engine`` sections of the config, as JSON. Each ``Job`` after it is answered by one ``Reply``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

from kvrelay.protocol.messages.base import ErrorInfo
from router.preparation import Job

LENGTH = struct.Struct("<I")


class Generate(msgspec.Struct, frozen=True, tag=True):
    """The request generates. ``request`` is JSON; ``prompts`` are lists of integers, each to be decoded on its own."""

    request: bytes
    prompts: list[msgspec.Raw]
    texts: list[str] | None


class Answer(msgspec.Struct, frozen=True, tag=True):
    """The JSON of a complete answer."""

    body: bytes


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """The request cannot be served."""

    error: ErrorInfo
    param: str | None


class Reply(msgspec.Struct, frozen=True):
    """What came of a body. ``unknown_fields``: names of fields without a meaning that this worker had not seen yet."""

    outcome: Generate | Answer | Refusal
    unknown_fields: list[str]


encode = msgspec.msgpack.Encoder().encode
decode_job = msgspec.msgpack.Decoder(Job).decode
decode_reply: Callable[[bytes], Reply] = msgspec.msgpack.Decoder(Reply).decode
decode_prompt = msgspec.msgpack.Decoder(list[int]).decode


def framed(message: bytes) -> bytes:
    """Return ``message`` as it is sent."""
    return LENGTH.pack(len(message)) + message
