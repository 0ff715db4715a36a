"""Writes a message from deltas: one JSON object, or a stream of Anthropic's events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping

import msgspec

from router.anthropic.errors import anthropic_error
from router.openai.answer import AnswerHead
from router.openai.blocks import Block, BlockBegun, BlockEnded, BlockEvent, BlockGrew, BlockKind, Blocks
from router.openai.choice import Choice, Delta
from router.openai.errors import AnswerError

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessageWriter:
    """Writes one message."""

    def __init__(self, head: AnswerHead, choice: Choice) -> None:
        self._head = head
        self._choice = choice
        self._blocks = Blocks()
        self._end: Mapping[str, object] = {"stop_reason": None, "stop_sequence": None}

    async def full(self, deltas: AsyncIterator[Delta]) -> list[bytes]:
        """Return the message when it is complete."""
        async for delta in deltas:
            self._take(delta)
            for _ in self._blocks.push(delta):
                pass
        content = [_content_block(block) for block in self._blocks.blocks]
        return [msgspec.json.encode(self._message(content))]

    async def events(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """Yield server-sent events. An error after the first is an event; before, it is raised."""
        begun = False
        try:
            async for delta in deltas:
                if not delta.is_news:
                    continue
                written = [] if begun else list(self._begin())
                begun = True
                self._take(delta)
                written += [self._event(event) for event in self._blocks.push(delta)]
                if written:
                    yield b"".join(written)
        except AnswerError as error:
            if not begun:
                raise
            yield _sent("error", anthropic_error(error))
            return
        last = [self._event(event) for event in self._blocks.finish()]
        delta_event = {"type": "message_delta", "delta": self._end, "usage": self._usage()}
        yield b"".join([*last, _sent("message_delta", delta_event), _sent("message_stop", {"type": "message_stop"})])

    # ------------------------------------------------------------ the message

    def _take(self, delta: Delta) -> None:
        """Note the end."""
        reason, stop = delta.finish_reason, delta.stop_reason
        if reason is None:
            return
        by_sequence = isinstance(stop, str)
        name = "stop_sequence" if by_sequence else _STOP_REASONS.get(reason, "end_turn")
        self._end = {"stop_reason": name, "stop_sequence": stop if by_sequence else None}

    def _message(self, content: list[dict[str, object]]) -> dict[str, object]:
        return {
            "id": self._head.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            **self._end,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, object]:
        """Return the tokens. Those of the prompt that no node had to compute are counted apart, as Anthropic does."""
        num_cached = self._choice.num_cached_tokens
        return {
            "input_tokens": self._choice.num_prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": self._choice.num_tokens,
        }

    # ------------------------------------------------------------ events

    def _begin(self) -> Iterator[bytes]:
        message = {**self._message([]), "stop_reason": None, "stop_sequence": None}
        yield _sent("message_start", {"type": "message_start", "message": message})
        yield _sent("ping", {"type": "ping"})

    def _event(self, event: BlockEvent) -> bytes:
        match event:
            case BlockBegun(block):
                return _block_sent("content_block_start", block, content_block=_empty_block(block))
            case BlockGrew(block, text):
                return _block_sent("content_block_delta", block, delta=_block_delta(block, text))
            case BlockEnded(block):
                return _block_sent("content_block_stop", block)


def _empty_block(block: Block) -> dict[str, object]:
    match block.kind:
        case BlockKind.REASONING:
            return {"type": "thinking", "thinking": "", "signature": ""}
        case BlockKind.TEXT:
            return {"type": "text", "text": ""}
        case BlockKind.CALL:
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def _block_delta(block: Block, text: str) -> dict[str, str]:
    match block.kind:
        case BlockKind.REASONING:
            return {"type": "thinking_delta", "thinking": text}
        case BlockKind.TEXT:
            return {"type": "text_delta", "text": text}
        case BlockKind.CALL:
            return {"type": "input_json_delta", "partial_json": text}


def _content_block(block: Block) -> dict[str, object]:
    empty = _empty_block(block)
    match block.kind:
        case BlockKind.REASONING:
            return {**empty, "thinking": block.text}
        case BlockKind.TEXT:
            return {**empty, "text": block.text}
        case BlockKind.CALL:
            return {**empty, "input": _arguments(block.text)}


def _arguments(text: str) -> object:
    """Return the arguments of a call as JSON, or none if they were cut off: ``input`` is an object in any case."""
    try:
        arguments = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return {}
    return msgspec.Raw(text.encode()) if isinstance(arguments, dict) else {}


def _block_sent(name: str, block: Block, **body: object) -> bytes:
    return _sent(name, {"type": name, "index": block.index, **body})


def _sent(name: str, body: Mapping[str, object]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(body))
