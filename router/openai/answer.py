"""Writes an answer from deltas: one JSON object, or a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from kvrelay.runtime.time_slice import TimeSlice
from router.openai.choice import Choice, Delta, usage
from router.openai.errors import AnswerError
from router.openai.json_pieces import object_pieces
from router.openai.logprobs import Logprobs, WholeLogprobs
from router.openai.sampling import num_logprobs
from router.openai.schemas import GenerationFields
from router.tools.parts import Part

DONE = b"data: [DONE]\n\n"

_PLACE = "\ue0fftext\ue0ff"
"""Stands for a chunk's text in a template. If anything else of a chunk contains it, there is no template."""


class Style(Protocol):
    """The differences between completions and chat completions. One object per answer."""

    object_name: str
    chunk_object_name: str

    def chunk_choice(self, choice: Choice, delta: Delta, *, first: bool) -> dict[str, object]:
        """Return ``delta`` as an item of a chunk's ``choices``, without the common fields."""

    def is_only_text(self, delta: Delta) -> bool:
        """Return whether ``chunk_choice`` of a ``delta`` in the middle of a choice has nothing of it but its text."""

    def full_choice(self, choice: Choice, text: str, parts: Sequence[Part] | None) -> dict[str, object]:
        """Return a complete choice as an item of ``choices``, without the common fields and logprobs.

        ``parts``: what a parser has found in the output; None: it is not parsed.
        """

    def logprobs(self, choice: Choice, delta: Delta) -> Logprobs | None:
        """Return the logprobs of ``delta``; None if not requested. Call once per delta."""

    def prompt_fields(self, choices: Sequence[Choice]) -> dict[str, object]:
        """Return the fields about the prompt, for the answer or its first chunk."""


class Writer(Protocol):
    """Writes one answer."""

    async def full(self, deltas: AsyncIterator[Delta]) -> list[bytes]:
        """Return the answer in pieces, when it is complete. Raises what ``deltas`` raise."""

    def events(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """Yield server-sent events. An error after the first is an event; before, it is raised."""


class AnswerHead(msgspec.Struct, frozen=True):
    """The fields that all parts of one answer share. ``created_s``: whole seconds since 1970."""

    answer_id: str
    created_s: int
    model: str

    def as_dict(self, object_name: str) -> dict[str, object]:
        """Return the common fields."""
        return {"id": self.answer_id, "object": object_name, "created": self.created_s, "model": self.model}


class Answer:
    """Writes one answer in one style, as ``request`` asks."""

    def __init__(self, head: AnswerHead, style: Style, choices: Sequence[Choice], request: GenerationFields) -> None:
        self._head = head
        self._style = style
        self._choices = choices
        self._with_token_ids = bool(request.return_token_ids)
        options = request.stream_options
        self._with_usage = options is not None and bool(options.include_usage)
        self._shows_tokens = self._with_token_ids or num_logprobs(request) is not None
        self._with_continuous_usage = self._with_usage and bool(options and options.continuous_usage_stats)
        self._begun = [False] * len(choices)
        self._templates: dict[int, tuple[bytes, bytes] | None] = {}

    async def full(self, deltas: AsyncIterator[Delta]) -> list[bytes]:
        """Return the answer as JSON when it is complete, in one piece per choice, or more if that is long."""
        wholes = [_Whole() for _ in self._choices]
        async for delta in deltas:
            wholes[delta.index].add(delta, self._style.logprobs(self._choices[delta.index], delta))
        body = self._head.as_dict(self._style.object_name)
        body["usage"] = usage(self._choices)
        pieces = object_pieces(body | self._style.prompt_fields(self._choices))
        pieces[-1] = pieces[-1][:-1] + b',"choices":['
        time_slice = TimeSlice()
        for choice, whole in zip(self._choices, wholes, strict=True):
            await time_slice.pause()
            first, *rest = object_pieces(self._full_choice(choice, whole))
            before = b"," if choice.index else pieces.pop()
            pieces += [before + first, *rest]
        pieces[-1] += b"]}"
        return pieces

    async def events(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """Yield server-sent events for deltas, and ``[DONE]`` at the end.

        An error after the first event is an event too, since the status has been sent; before, it is raised.
        """
        begun = False
        try:
            async for delta in deltas:
                if delta.is_news:
                    begun = True
                    if delta.parts is None:
                        yield self._event(delta)
                    else:
                        for chunk in self._chunks_of_parts(delta):
                            yield event(chunk)
        except AnswerError as error:
            if not begun:
                raise
            yield event(error.body)
            yield DONE
            return
        if self._with_usage:
            yield event({**self._chunk_head(), "choices": [], "usage": usage(self._choices)})
        yield DONE

    def _event(self, delta: Delta) -> bytes:
        """Return the chunk for ``delta`` as an event. In the middle of most choices only the text changes."""
        index = delta.index
        if self._begun[index] and delta.finish_reason is None and self._style.is_only_text(delta):
            if index not in self._templates:
                self._templates[index] = self._template(index)
            template = self._templates[index]
            if template is not None:
                return template[0] + msgspec.json.encode(delta.text) + template[1]
        return event(self._chunk(delta))

    def _template(self, index: int) -> tuple[bytes, bytes] | None:
        """Return what is before and behind the text in each chunk of a choice, or None if more than that changes."""
        if self._with_token_ids or self._with_continuous_usage:
            return None
        before, *behind = event(self._chunk(Delta(index, _PLACE, []))).split(msgspec.json.encode(_PLACE))
        return (before, behind[0]) if len(behind) == 1 else None

    def _chunks_of_parts(self, delta: Delta) -> Iterator[dict[str, object]]:
        """Yield a chunk for each part. What is held back needs none, but the first token does."""
        for piece in delta.pieces():
            if piece.parts or piece.finish_reason or self._shows_tokens or not self._begun[delta.index]:
                yield self._chunk(piece)

    def _chunk(self, delta: Delta) -> dict[str, object]:
        choice, first = self._choices[delta.index], not self._begun[delta.index]
        self._begun[delta.index] = True
        item: dict[str, object] = {"index": delta.index, **self._style.chunk_choice(choice, delta, first=first)}
        item["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None:
            item["stop_reason"] = delta.stop_reason
        body = self._chunk_head()
        if self._with_token_ids:
            item["token_ids"] = delta.token_ids
        if first:
            body |= self._style.prompt_fields([choice])
        body["choices"] = [item]
        if self._with_usage:
            body["usage"] = usage([choice]) if self._with_continuous_usage else None
        return body

    def _chunk_head(self) -> dict[str, object]:
        return self._head.as_dict(self._style.chunk_object_name)

    def _full_choice(self, choice: Choice, whole: _Whole) -> dict[str, object]:
        item: dict[str, object] = {
            "index": choice.index,
            **self._style.full_choice(choice, "".join(whole.texts), whole.parts),
            "logprobs": whole.logprobs.as_json() if whole.logprobs else None,
            "finish_reason": whole.finish_reason,
            "stop_reason": whole.stop_reason,
        }
        if self._with_token_ids:
            item["token_ids"] = whole.token_ids
        return item


@dataclass(slots=True)
class _Whole:
    """What has been received of one choice. ``logprobs``: None if not requested; ``parts``: as in ``Delta``."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: WholeLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    parts: list[Part] | None = None

    def add(self, delta: Delta, logprobs: Logprobs | None) -> None:
        """Add a delta."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.parts is not None:
            self.parts = self.parts or []
            self.parts += delta.parts
        if logprobs is not None:
            self.logprobs = self.logprobs or WholeLogprobs()
            self.logprobs.add(logprobs)


def event(body: dict[str, object]) -> bytes:
    """Return ``body`` as a server-sent event. JSON has no raw line breaks, so text cannot end it early."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
