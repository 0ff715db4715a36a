"""What is sent: conversations of one or more turns, made at random or read from a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvrelay.bench.errors import BenchError
from kvrelay.bench.prompts import Content, PromptMaker

TRACE_BLOCK_TOKENS = 512
"""Tokens for which one hash id of a Mooncake trace stands."""

_MAX_TRACE_TOKENS = 10_000_000
"""Longest prompt or output of a trace."""

_MIN_TOKENS = 4
_MAX_PROMPT_TOKENS = 1024
_MAX_TOTAL_TOKENS = 2048
"""Conversations of ShareGPT outside these bounds are left out, as ``vllm bench serve`` does."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: a prompt, or what a user says in a chat, of about ``num_tokens``, and the length of the answer."""

    content: Content
    num_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow one another, each after the answer to the last one and ``pause_s``.

    ``system``: a text before all turns. ``start_s``: when it begins, if the load says so.
    """

    turns: tuple[Turn, ...]
    system: Content = ""
    pause_s: float = 0.0
    start_s: float | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens: uniform between the mean times 1 - ``range_ratio`` and 1 + ``range_ratio``, and at least 1."""

    mean: int
    range_ratio: float = 0.0

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Return ``count`` lengths."""
        low = max(1, math.floor(self.mean * (1 - self.range_ratio)))
        high = max(low, math.ceil(self.mean * (1 + self.range_ratio)))
        return [int(length) for length in rng.integers(low, high + 1, size=count)]


@dataclass(frozen=True, slots=True)
class RandomLoad:
    """Random prompts and chats. ``prefix_tokens`` at the beginning are the same in all of them."""

    count: int
    input_lengths: Lengths
    output_lengths: Lengths
    num_turns: int = 1
    prefix_tokens: int = 0
    mean_pause_s: float = 0.0

    @property
    def takes_token_ids(self) -> bool:
        """Whether prompts may be token ids."""
        return self.num_turns == 1

    def conversations(self, maker: PromptMaker, seed: int) -> list[Conversation]:
        """Return the load drawn with ``seed``."""
        rng = np.random.default_rng(seed)
        num_requests = self.count * self.num_turns
        inputs = self.input_lengths.draw(rng, num_requests)
        outputs = self.output_lengths.draw(rng, num_requests)
        pauses = rng.exponential(self.mean_pause_s, self.count) if self.mean_pause_s else np.zeros(self.count)
        prefix = maker.part((seed, "prefix"), self.prefix_tokens) if self.prefix_tokens else None
        made = []
        for index in range(self.count):
            which = range(index * self.num_turns, (index + 1) * self.num_turns)
            turns = [Turn(maker.part((seed, turn), inputs[turn]), inputs[turn], outputs[turn]) for turn in which]
            system: Content = ""
            if prefix is not None and self.num_turns > 1:
                system = prefix
            elif prefix is not None:
                whole = maker.join([prefix, turns[0].content])
                turns[0] = replace(turns[0], content=whole, num_tokens=turns[0].num_tokens + self.prefix_tokens)
            made.append(Conversation(tuple(turns), system, float(pauses[index])))
        return made


@dataclass(frozen=True, slots=True)
class ShareGPTLoad:
    """Chats from a file in ShareGPT's format: a JSON list of ``{"conversations": [{"from", "value"}, ...]}``.

    With one turn, the first message is the prompt and the length of the second is that of the answer. With more, up to
    ``max_turns`` messages of the user are sent; answers are the server's. ``output_tokens`` replaces their lengths.
    """

    path: Path
    count: int
    max_turns: int = 1
    output_tokens: int | None = None

    @property
    def takes_token_ids(self) -> bool:
        """Whether prompts may be token ids: the file has texts."""
        return False

    def conversations(self, maker: PromptMaker, seed: int) -> list[Conversation]:
        """Return ``count`` conversations in an order drawn with ``seed``. Raises BenchError if the file has none."""
        entries = [entry for entry in _read_json(self.path) if len(_messages(entry)) >= 2]
        random.Random(seed).shuffle(entries)
        usable: list[Conversation] = []
        for entry in entries:
            if len(usable) == self.count:
                break
            turns = tuple(self._turns(_messages(entry), maker))
            if turns:
                usable.append(Conversation(turns))
        if not usable:
            raise BenchError(
                f"{self.path}: no conversation with a prompt of {_MIN_TOKENS} to {_MAX_PROMPT_TOKENS} tokens and at "
                f"most {_MAX_TOTAL_TOKENS} with its answer"
            )
        return [usable[index % len(usable)] for index in range(self.count)]

    def _turns(self, messages: Sequence[str], maker: PromptMaker) -> Iterator[Turn]:
        total = 0
        for prompt, answer in list(zip(messages[::2], messages[1::2], strict=False))[: self.max_turns]:
            num_tokens = maker.count(prompt)
            max_tokens = self.output_tokens or maker.count(answer)
            total += num_tokens + max_tokens
            too_short = num_tokens < _MIN_TOKENS or (self.output_tokens is None and max_tokens < _MIN_TOKENS)
            if too_short or num_tokens > _MAX_PROMPT_TOKENS or total > _MAX_TOTAL_TOKENS:
                return
            yield Turn(prompt, num_tokens, max_tokens)


@dataclass(frozen=True, slots=True)
class MooncakeLoad:
    """A trace of Mooncake: JSON lines of ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``.

    A hash id stands for ``TRACE_BLOCK_TOKENS`` tokens: prompts with the same ids at the beginning have that prefix in
    common. All lengths are multiplied by ``length_scale``, times divided by ``speedup``.
    """

    path: Path
    count: int | None = None
    speedup: float = 1.0
    length_scale: float = 1.0

    @property
    def takes_token_ids(self) -> bool:
        """Whether prompts may be token ids."""
        return True

    def conversations(self, maker: PromptMaker, seed: int) -> list[Conversation]:
        """Return the trace's requests; ``seed`` decides which tokens an id stands for. Raises BenchError."""
        block_tokens = max(1, round(TRACE_BLOCK_TOKENS * self.length_scale))
        made: list[Conversation] = []
        first_ms = None
        for number, line in enumerate(_read_text(self.path).splitlines(), 1):
            if not line.strip():
                continue
            if len(made) == self.count:
                break
            at_ms, num_input, num_output, hash_ids = self._entry(line, number)
            first_ms = at_ms if first_ms is None else first_ms
            num_tokens = max(1, round(num_input * self.length_scale))
            parts, left = [], num_tokens
            for hash_id in hash_ids:
                if left <= 0:
                    break
                parts.append(maker.part((seed, hash_id), min(block_tokens, left)))
                left -= block_tokens
            if left > 0:
                parts.append(maker.part((seed, "line", number), left))
            turn = Turn(maker.join(parts), num_tokens, max(1, round(num_output * self.length_scale)))
            made.append(Conversation((turn,), start_s=max(0.0, at_ms - first_ms) / 1000 / self.speedup))
        if not made:
            raise BenchError(f"{self.path}: the trace is empty")
        return made

    def _entry(self, line: str, number: int) -> tuple[float, int, int, list[int]]:
        try:
            entry = json.loads(line)
            lengths = int(entry["input_length"]), int(entry["output_length"])
            at_ms = float(entry["timestamp"])
            if not all(0 <= length <= _MAX_TRACE_TOKENS for length in lengths) or not math.isfinite(at_ms):
                raise ValueError(f"lengths should be 0 to {_MAX_TRACE_TOKENS:,}, and timestamp finite")
            return at_ms, *lengths, list(entry.get("hash_ids") or [])
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise BenchError(
                f"{self.path}:{number}: should be a JSON object with timestamp, input_length, output_length and "
                f"hash_ids: {type(error).__name__}: {error}"
            ) from error


Load = RandomLoad | ShareGPTLoad | MooncakeLoad


def _messages(entry: Any) -> list[str]:
    """Return the texts of a ShareGPT entry, beginning with the user's; none if it has another format."""
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        return []
    messages = [message for message in entry["conversations"] if isinstance(message, dict)]
    if messages and messages[0].get("from") in ("system", "gpt"):
        messages = messages[1:]
    return [str(message.get("value") or "") for message in messages]


def _read_json(path: Path) -> list[Any]:
    try:
        data = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, list):
        raise BenchError(f"{path}: should be a JSON list of conversations")
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: cannot be read: {error}") from error
