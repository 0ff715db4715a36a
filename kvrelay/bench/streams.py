"""One streamed answer: when its chunks came and what they say. Definitions are those of ``vllm bench serve``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from kvrelay.bench.http import Client

_MAX_ERROR_CHARS = 300
_MAX_HEAD_BYTES = 16384
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""Exceptions of JSON that is none, or not what it should be; ValueError: text that is not UTF-8."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    id: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    message: str | None = None


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are seconds; ``start_s`` is when it was sent, on the clock of ``time.perf_counter``.

    ``chunk_times_s`` are the arrivals of chunks with a choice, since ``start_s``: the first is the TTFT, the last the
    E2E latency, and their differences are ITLs. A chunk may have several tokens, so that ``output_tokens`` are those of
    ``usage``, and only without one (``has_usage``) as many as chunks. ``error``: why it failed.
    """

    start_s: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    chunk_times_s: list[float] = field(default_factory=list)
    answer_id: str = ""
    error: str | None = None
    has_usage: bool = False

    @property
    def ttft_s(self) -> float:
        """Time from sending the request to the first chunk."""
        return self.chunk_times_s[0]

    @property
    def e2e_s(self) -> float:
        """Time from sending the request to the last chunk."""
        return self.chunk_times_s[-1]

    @property
    def itls_s(self) -> list[float]:
        """Gaps between consecutive chunks."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times_s)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for one token."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


async def stream(
    client: Client, path: str, body: dict[str, Any], prompt_tokens: int, texts: list[str] | None = None
) -> RequestRecord:
    """Send one request and read its stream. Errors are in the record. ``texts``: takes the pieces of the answer."""
    encoded = msgspec.json.encode(body)
    reader = _StreamReader(texts)
    record = reader.record = RequestRecord(time.perf_counter(), prompt_tokens)
    try:
        answer = await client.send("POST", path, encoded, reader.take)
    except OSError as error:
        record.error = f"{type(error).__name__}: {error}"
        return record
    if answer.status != 200:
        record.error = f"status {answer.status}: {_message(reader.head) or answer.reason}"
    elif record.error is None and not record.chunk_times_s:
        record.error = "the answer has no chunk with a choice"
    if not record.has_usage:
        record.output_tokens = len(record.chunk_times_s)
    return record


class _StreamReader:
    """Reads server-sent events into a record."""

    def __init__(self, texts: list[str] | None) -> None:
        self.record = RequestRecord(0.0)
        self.head = b""
        """How the body begins: what an error says."""
        self._rest = b""
        self._texts = texts

    def take(self, data: bytes, at_s: float) -> None:
        """Take a part of the body, which arrived at ``at_s``."""
        if not self.record.chunk_times_s and len(self.head) < _MAX_HEAD_BYTES:
            self.head += data
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take_event(line[5:].strip(), at_s)

    def _take_event(self, event: bytes, at_s: float) -> None:
        if event == b"[DONE]":
            return
        record = self.record
        try:
            chunk = _decode(event)
        except _UNREADABLE as error:
            record.error = f"a chunk is not of the OpenAI API: {error}"
            return
        if chunk.error is not None:
            record.error = _message(event)
        if chunk.choices:
            record.chunk_times_s.append(at_s - record.start_s)
            record.answer_id = record.answer_id or chunk.id or ""
            if self._texts is not None:
                choice = chunk.choices[0]
                self._texts.append((choice.delta.content if choice.delta else choice.text) or "")
        if chunk.usage is not None:
            record.has_usage = True
            record.output_tokens = chunk.usage.completion_tokens or 0
            if chunk.usage.prompt_tokens is not None:
                record.prompt_tokens = chunk.usage.prompt_tokens


_decode = msgspec.json.Decoder(_Chunk).decode


def _message(body: bytes) -> str:
    """Return the message of an error in any server's format."""
    try:
        answer = _decode(body)
    except _UNREADABLE:
        return body.decode("utf-8", "replace").strip()[:_MAX_ERROR_CHARS]
    error = answer.error
    if isinstance(error, dict):
        return str(error.get("message") or error)[:_MAX_ERROR_CHARS]
    return str(error or answer.message or body.decode("utf-8", "replace"))[:_MAX_ERROR_CHARS]
