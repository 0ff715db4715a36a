"""Writes a response from deltas: one JSON object, or a stream of typed events in OpenAI's order."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec

from kvrelay.runtime.time_slice import TimeSlice
from kvrelay.tokenizer.token_bytes import TokenBytes
from router.openai.answer import AnswerHead
from router.openai.blocks import Block, BlockBegun, BlockEnded, BlockEvent, BlockGrew, BlockKind, Blocks
from router.openai.choice import Choice, Delta
from router.openai.errors import AnswerError
from router.openai.json_pieces import JsonItems, filled
from router.openai.logprobs import chat_logprobs
from router.responses.reasoning_tokens import ReasoningTokens

_ID_PREFIXES = {BlockKind.REASONING: "rs", BlockKind.TEXT: "msg", BlockKind.CALL: "fc"}
_NO_LOGPROBS = msgspec.Raw(b"[]")


class ResponseWriter:
    """Writes one response. ``echo``: JSON of the object with the fields of the request that it repeats."""

    def __init__(
        self, head: AnswerHead, choice: Choice, echo: bytes, token_bytes: TokenBytes, *, with_logprobs: bool
    ) -> None:
        self._head = head
        self._choice = choice
        self._echo = echo
        self._token_bytes = token_bytes
        self._with_logprobs = with_logprobs
        self._blocks = Blocks()
        self._reasoning_tokens = ReasoningTokens(token_bytes)
        self._logprobs = JsonItems()
        self._new_logprobs: list[bytes] = []
        self._stand_in = b'"%s"' % secrets.token_hex(16).encode()
        """Stands for all logprobs in what is encoded: they are put there in pieces, since they may be long."""
        self._finish_reason: str | None = None
        self._is_over = False
        self._sequence_number = 0

    async def full(self, deltas: AsyncIterator[Delta]) -> list[bytes]:
        """Return the response when it is complete."""
        async for delta in deltas:
            self._take(delta)
            for _ in self._blocks.push(delta):
                pass
        for _ in self._blocks.finish(needs_text=True):
            pass
        return filled(self._response(self._status), self._stand_in, self._logprobs)

    async def events(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """Yield server-sent events. An error after the first is an event; before, it is raised."""
        begun = False
        try:
            async for delta in deltas:
                if not delta.is_news:
                    continue
                names = () if begun else ("created", "in_progress")
                written = [self._life(name, "in_progress") for name in names]
                begun = True
                self._new_logprobs += self._take(delta)
                written += [self._event(event) for event in self._blocks.push(delta)]
                if written:
                    yield b"".join(written)
        except AnswerError as error:
            if not begun:
                raise
            last = [self._life("failed", "failed", {"code": "server_error", "message": error.error.message})]
        else:
            self._is_over = True
            last = [self._event(event) for event in self._blocks.finish(needs_text=True)]
            last.append(self._life(self._status, self._status))
        time_slice = TimeSlice()
        for piece in filled(b"".join(last), self._stand_in, self._logprobs):
            await time_slice.pause()
            yield piece

    # ------------------------------------------------------------ the response

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _response(self, status: str, error: dict[str, str] | None = None) -> bytes:
        is_over = status != "in_progress"
        items = [self._item(block, self._item_status(block, status)) for block in self._blocks.blocks]
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        body = {
            "id": self._head.answer_id,
            "object": "response",
            "created_at": self._head.created_s,
            "status": status,
            "error": error,
            "incomplete_details": reason,
            "model": self._head.model,
            "output": items if is_over else [],
            "usage": self._usage() if is_over else None,
        }
        return msgspec.json.encode(body)[:-1] + b"," + self._echo[1:]

    def _item_status(self, block: Block, status: str) -> str:
        is_last = block.index == len(self._blocks.blocks) - 1
        return "incomplete" if is_last and status != "completed" else "completed"

    def _usage(self) -> dict[str, object]:
        num_input, num_output = self._choice.num_prompt_tokens, self._choice.num_tokens
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": self._choice.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens.count},
            "total_tokens": num_input + num_output,
        }

    # ------------------------------------------------------------ items

    def _item_id(self, block: Block) -> str:
        return f"{_ID_PREFIXES[block.kind]}_{self._head.answer_id.partition('_')[2]}_{block.index}"

    def _item(self, block: Block, status: str, *, is_empty: bool = False) -> dict[str, object]:
        item: dict[str, object] = {"id": self._item_id(block), "status": status}
        content = [] if is_empty else [self._part(block)]
        match block.kind:
            case BlockKind.REASONING:
                return item | {"type": "reasoning", "summary": [], "content": content}
            case BlockKind.TEXT:
                return item | {"type": "message", "role": "assistant", "content": content}
            case BlockKind.CALL:
                call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return item | {"type": "function_call", **call}

    def _part(self, block: Block, *, is_empty: bool = False) -> dict[str, object]:
        text = "" if is_empty else block.text
        if block.kind is BlockKind.REASONING:
            return {"type": "reasoning_text", "text": text}
        logprobs = _NO_LOGPROBS if is_empty else self._all_logprobs()
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _all_logprobs(self) -> msgspec.Raw:
        return msgspec.Raw(self._stand_in) if self._with_logprobs else _NO_LOGPROBS

    def _take_new_logprobs(self) -> msgspec.Raw:
        """Return the logprobs that no delta had yet: also those of tokens that were no text when they came."""
        new, self._new_logprobs = self._new_logprobs, []
        return msgspec.Raw(b"[%s]" % b",".join(new))

    # ------------------------------------------------------------ events

    def _take(self, delta: Delta) -> list[bytes]:
        """Note the end, and the logprobs of ``delta``; return these, encoded."""
        self._finish_reason = delta.finish_reason or self._finish_reason
        self._reasoning_tokens.add(delta)
        if not self._with_logprobs or not delta.token_ids:
            return []
        entries = chat_logprobs(self._token_bytes, delta.token_ids, delta.logprobs)["content"]
        encoded = msgspec.json.encode(entries)[1:-1]
        self._logprobs.add_encoded(encoded)
        return [encoded]

    def _life(self, name: str, status: str, error: dict[str, str] | None = None) -> bytes:
        return self._sent(f"response.{name}", {"response": msgspec.Raw(self._response(status, error))})

    def _event(self, event: BlockEvent) -> bytes:
        match event:
            case BlockBegun(block):
                return b"".join(self._begun(block))
            case BlockGrew(block, text):
                return self._grew(block, text)
            case BlockEnded(block):
                return b"".join(self._ended(block))

    def _begun(self, block: Block) -> Iterator[bytes]:
        item = self._item(block, "in_progress", is_empty=True)
        yield self._sent("response.output_item.added", {"output_index": block.index, "item": item})
        if block.kind is not BlockKind.CALL:
            part = self._part(block, is_empty=True)
            yield self._sent("response.content_part.added", {**self._place(block), "part": part})

    def _grew(self, block: Block, text: str) -> bytes:
        body = {**self._place(block), "delta": text}
        if block.kind is BlockKind.TEXT:
            body["logprobs"] = self._take_new_logprobs()
        return self._sent(f"response.{_name(block)}.delta", body)

    def _ended(self, block: Block) -> Iterator[bytes]:
        place = self._place(block)
        match block.kind:
            case BlockKind.CALL:
                done: dict[str, object] = {"name": block.name, "arguments": block.text}
            case BlockKind.TEXT:
                done = {"text": block.text, "logprobs": self._all_logprobs()}
            case BlockKind.REASONING:
                done = {"text": block.text}
        yield self._sent(f"response.{_name(block)}.done", {**place, **done})
        if block.kind is not BlockKind.CALL:
            yield self._sent("response.content_part.done", {**place, "part": self._part(block)})
        item = self._item(block, self._status if self._is_over else "completed")
        yield self._sent("response.output_item.done", {"output_index": block.index, "item": item})

    def _place(self, block: Block) -> dict[str, Any]:
        place = {"item_id": self._item_id(block), "output_index": block.index}
        return place if block.kind is BlockKind.CALL else {**place, "content_index": 0}

    def _sent(self, kind: str, body: dict[str, Any]) -> bytes:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        content = msgspec.json.encode({"type": kind, "sequence_number": number, **body})
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), content)


def _name(block: Block) -> str:
    """Return the middle of the names of a block's events."""
    if block.kind is BlockKind.CALL:
        return "function_call_arguments"
    return "output_text" if block.kind is BlockKind.TEXT else "reasoning_text"
