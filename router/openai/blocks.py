"""The content of one answer as blocks: reasoning, text and tool calls, one after the other.

The dialects that are not chat completions write their answers from these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from router.openai.choice import Delta
from router.tools.parts import CallArguments, CallBegun, Part, Reasoning, Text


class BlockKind(StrEnum):
    """Kinds of blocks."""

    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True)
class Block:
    """One block. ``index`` counts them from 0. ``call_id`` and ``name`` are those of a tool call."""

    index: int
    kind: BlockKind
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far; of a call: its arguments, as JSON."""
        return "".join(self.pieces)


class BlockBegun(NamedTuple):
    """``block`` has begun; it is empty."""

    block: Block


class BlockGrew(NamedTuple):
    """``block`` has got ``text``."""

    block: Block
    text: str


class BlockEnded(NamedTuple):
    """``block`` is complete."""

    block: Block


BlockEvent: TypeAlias = BlockBegun | BlockGrew | BlockEnded


class Blocks:
    """Makes blocks of deltas. A block ends when another begins, or at the end.

    Of a parsed output, text that is nothing but whitespace makes no block: models write it around reasoning and calls.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._is_open = False
        self._whitespace = ""

    def push(self, delta: Delta) -> Iterator[BlockEvent]:
        """Yield what ``delta`` changes."""
        if delta.parts is None:
            if delta.text:
                yield from self._add(BlockKind.TEXT, delta.text)
            return
        for part in delta.parts:
            yield from self._take(part)

    def finish(self, *, needs_text: bool = False) -> Iterator[BlockEvent]:
        """Yield the end of the last block. ``needs_text``: if there are none, there is one with an empty text."""
        if needs_text and not self.blocks:
            yield self._begin(BlockKind.TEXT)
        yield from self._end()

    def _take(self, part: Part) -> Iterator[BlockEvent]:
        match part:
            case Reasoning(text):
                yield from self._add(BlockKind.REASONING, text)
            case Text(text):
                if not self._is_in(BlockKind.TEXT):
                    text = self._whitespace + text
                    self._whitespace = "" if text.strip() else text
                if text and not self._whitespace:
                    yield from self._add(BlockKind.TEXT, text)
            case CallBegun(_, call_id, name):
                yield from self._end()
                yield self._begin(BlockKind.CALL, call_id, name)
            case CallArguments(_, text):
                yield from self._add(BlockKind.CALL, text)

    def _add(self, kind: BlockKind, text: str) -> Iterator[BlockEvent]:
        if not self._is_in(kind):
            yield from self._end()
            yield self._begin(kind)
        block = self.blocks[-1]
        block.pieces.append(text)
        yield BlockGrew(block, text)

    def _is_in(self, kind: BlockKind) -> bool:
        return self._is_open and self.blocks[-1].kind is kind

    def _begin(self, kind: BlockKind, call_id: str = "", name: str = "") -> BlockBegun:
        self._whitespace = ""
        self._is_open = True
        self.blocks.append(Block(len(self.blocks), kind, call_id, name))
        return BlockBegun(self.blocks[-1])

    def _end(self) -> Iterator[BlockEvent]:
        if self._is_open:
            self._is_open = False
            yield BlockEnded(self.blocks[-1])
