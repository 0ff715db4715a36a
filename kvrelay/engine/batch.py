"""The flattened batch of one step: sequences are concatenated without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.protocol.messages.engine import SequenceFailed, SequenceOutcome

Bools = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence: ``num_tokens`` from ``first_row`` on, for positions from ``start`` on.

    ``index``: where the sequence is among the batch's ``items``.
    ``block_table``: a view of the sequence's own table, up to the block of the step's last position.
    """

    index: int
    first_row: int
    num_tokens: int
    start: int
    block_table: Int32
    block_size: int

    @property
    def context_len(self) -> int:
        """Number of positions of the sequence that have KV after this step."""
        return self.start + self.num_tokens

    def slots(self, first: int) -> Int64:
        """Return the slots of the positions from ``first`` to the last one of the step."""
        first_block = first // self.block_size
        blocks = self.block_table[first_block:, None] * np.int64(self.block_size)
        slots: Int64 = (blocks + np.arange(self.block_size)).reshape(-1)
        skipped = first_block * self.block_size
        return slots[first - skipped : self.context_len - skipped]


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """All rows of a step. Row r is a token ``token_ids[r]`` at ``positions[r]``.

    ``items`` are the sequences that are computed, in order of the plan. The others broke a limit: they are ``failed``,
    by their place in the plan.

    The KV of row ``written_rows[i]`` (None: of row i) goes to slot ``slot_mapping[i]``; that of other rows is there
    already. Spans are ordered by context length with single tokens first, so that similar decodes lie side by side.
    ``sampling_rows`` are the rows after which a token is sampled, in order of ``items``: one for each sequence that
    samples, and one more for each of its drafts.

    It is good until the next one is assembled: arrays are kept from step to step, and block tables are the sequences'.
    """

    items: list[ScheduledSequence]
    failed: dict[int, SequenceFailed]
    spans: list[Span]
    token_ids: Int64
    positions: Int64
    slot_mapping: Int64
    written_rows: Int64 | None
    sampling_rows: Int64

    @property
    def samples_after_every_row(self) -> bool:
        """Whether there are logits for each row."""
        return len(self.sampling_rows) == len(self.token_ids)

    @property
    def first_rows(self) -> list[int]:
        """The first row of each of ``items``."""
        first_rows = [0] * len(self.items)
        for span in self.spans:
            first_rows[span.index] = span.first_row
        return first_rows

    def outcomes(self, computed: Iterable[SequenceOutcome]) -> list[SequenceOutcome]:
        """Return the outcome of each sequence of the plan; ``computed`` are those of ``items``."""
        if not self.failed:
            return list(computed)
        others, places = iter(computed), range(len(self.items) + len(self.failed))
        return [self.failed[place] if place in self.failed else next(others) for place in places]

    def first_positions_of(self, rows: Bools) -> dict[int, int]:
        """Return, for each of ``items`` that has any of ``rows`` [number of rows], the position of the first.

        Rows of drafts are not attributed to a sequence, because they are only valid if the draft is accepted.
        """
        if not rows.any():
            return {}
        positions: dict[int, int] = {}
        for span in self.spans:
            end = span.first_row + span.num_tokens - len(self.items[span.index].drafts or ())
            own = rows[span.first_row : end]
            if own.any():
                positions[span.index] = span.start + int(own.argmax())
        return positions


class StepLimits(NamedTuple):
    """Limits of each sequence of a step. Beyond them a step would access memory outside the pool or the weights."""

    block_size: int
    num_blocks: int
    max_model_len: int
    vocab_size: int


class _Part(NamedTuple):
    """What a step computes of one sequence, and the blocks up to the last token, where the sequence has them."""

    token_ids: list[int]
    block_table: Int32


class BatchAssembler:
    """Flattens steps into arrays that are reused and grow to the size of the largest step."""

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits
        self._rows = np.empty((3, 0), np.int64)
        """Token ids, positions and slots."""

    def assemble(self, scheduled: Sequence[ScheduledSequence]) -> RaggedBatch:
        """Flatten those of ``scheduled`` that are within the limits. The batch may be empty."""
        items: list[ScheduledSequence] = []
        parts: list[_Part] = []
        failed: dict[int, SequenceFailed] = {}
        for place, item in enumerate(scheduled):
            part = _part(item, self._limits)
            if isinstance(part, SequenceFailed) and item.drafts:
                item = item.without_drafts  # noqa: PLW2901 (a guess beyond the limits is a wrong one)
                part = _part(item, self._limits)
            if isinstance(part, SequenceFailed):
                failed[place] = part
            else:
                items.append(item)
                parts.append(part)
        return self._flatten(items, parts, failed)

    def _flatten(
        self, items: list[ScheduledSequence], parts: list[_Part], failed: dict[int, SequenceFailed]
    ) -> RaggedBatch:
        block_size = self._limits.block_size
        order = sorted(range(len(items)), key=lambda index: _sort_key(items[index]))
        num_rows = sum(item.num_tokens for item in items)
        if num_rows > self._rows.shape[1]:
            self._rows = np.empty((3, max(num_rows, 2 * self._rows.shape[1])), np.int64)
        token_ids, positions, slots = self._rows[:, :num_rows]
        spans: list[Span] = []
        last_rows = [0] * len(items)
        first = 0
        for index in order:
            ids, table = parts[index]
            start, num_tokens = items[index].start, items[index].num_tokens
            span = Span(index, first, num_tokens, start, table, block_size)
            if num_tokens == 1:
                token_ids[first] = ids[0]
                positions[first] = start
                slots[first] = int(table[-1]) * block_size + start % block_size
            else:
                rows = slice(first, first + num_tokens)
                token_ids[rows] = ids
                positions[rows] = np.arange(start, start + num_tokens)
                slots[rows] = span.slots(start)
            spans.append(span)
            first += num_tokens
            last_rows[index] = first - 1
        written = _written_rows(spans, items, positions)
        sampling = [last_rows[index] - back for index, item in enumerate(items) for back in _places(item)]
        return RaggedBatch(
            items=items,
            failed=failed,
            spans=spans,
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots if written is None else slots[written],
            written_rows=written,
            sampling_rows=np.array(sampling, np.int64),
        )


def _places(item: ScheduledSequence) -> range:
    """Return how far before the last row of ``item`` it samples: at the newest token and at each draft."""
    return range(len(item.drafts or ()), -1, -1) if item.samples else range(0)


def _written_rows(spans: list[Span], items: Sequence[ScheduledSequence], positions: Int64) -> Int64 | None:
    """Return the rows whose KV must be written, or None if that is every row, the usual case."""
    firsts = [items[span.index].writes_from for span in spans]
    if all(first <= span.start for first, span in zip(firsts, spans, strict=True)):
        return None
    return np.flatnonzero(positions >= np.repeat(firsts, [span.num_tokens for span in spans]))


def _sort_key(item: ScheduledSequence) -> tuple[bool, int]:
    return item.num_tokens > 1, item.start + item.num_tokens


def _part(item: ScheduledSequence, limits: StepLimits) -> _Part | SequenceFailed:
    """Return what to compute of ``item``, or how it breaks ``limits``."""
    if failed := misplaced(item, limits):
        return failed
    num_blocks = -(-(item.start + item.num_tokens) // limits.block_size)
    blocks = np.frombuffer(item.sequence.block_table, np.int32, num_blocks)
    token_ids = item.token_ids
    if failed := outside_pool(blocks, limits.num_blocks) or outside_vocabulary(token_ids, limits.vocab_size):
        return failed
    return _Part(token_ids, blocks)


def misplaced(item: ScheduledSequence, limits: StepLimits, num_awaited: int = 0) -> SequenceFailed | None:
    """Return how the positions of ``item`` break ``limits``, if they do.

    ``num_awaited`` tokens of its sequence are being sampled now.
    """
    end = item.start + item.num_tokens
    known = item.sequence.num_tokens + num_awaited + len(item.drafts or ())
    num_blocks = len(item.sequence.block_table)
    if item.num_tokens < 1 or item.start < 0 or end > known:
        return SequenceFailed(f"the step wants positions {item.start} to {end} of {known} tokens")
    if end > limits.max_model_len:
        return SequenceFailed(f"{end} tokens are more than the model's {limits.max_model_len}")
    if end > num_blocks * limits.block_size:
        return SequenceFailed(f"{num_blocks} blocks of {limits.block_size} do not hold {end} tokens")
    return None


def outside_pool(blocks: Int32, num_blocks: int) -> SequenceFailed | None:
    """Return the failure of a sequence with any of ``blocks``, which are not none, outside a pool of ``num_blocks``."""
    # as unsigned numbers, so that one comparison finds those below 0 as well
    if np.maximum.reduce(blocks.view(np.uint32)) >= num_blocks:
        return SequenceFailed(f"the block table leaves the pool of {num_blocks} blocks")
    return None


def outside_vocabulary(token_ids: Sequence[int], vocab_size: int) -> SequenceFailed | None:
    """Return the failure of a sequence with any of ``token_ids`` outside the vocabulary."""
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        return SequenceFailed(f"token id {outside} is not in the vocabulary of {vocab_size}")
    return None
