"""The batch of one step, flattened: sequences one after the other, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.core.errors import EngineError
from kvrelay.core.step import ScheduledSequence

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence: ``num_tokens`` from ``first_row`` on, for positions from ``start`` on.

    ``index``: where the sequence is in the plan's batch.
    ``block_table``: the blocks of all positions up to the last one of the step.
    """

    index: int
    first_row: int
    num_tokens: int
    start: int
    block_table: Int64
    block_size: int

    @property
    def context_len(self) -> int:
        """Positions of the sequence that have KV after this step."""
        return self.start + self.num_tokens

    def slots(self, first: int) -> Int64:
        """Return the slots of the positions from ``first`` to the last one of the step."""
        first_block = first // self.block_size
        blocks = self.block_table[first_block:, None] * self.block_size
        slots: Int64 = (blocks + np.arange(self.block_size)).reshape(-1)
        skipped = first_block * self.block_size
        return slots[first - skipped : self.context_len - skipped]


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """All rows of a step. Row r is a token ``token_ids[r]`` at ``positions[r]``.

    The KV of row ``written_rows[i]`` (None: of row i) goes to slot ``slot_mapping[i]``; that of other rows is there
    already. Spans are ordered by context length with single tokens first, so that similar decodes lie side by side.
    ``sampling_rows`` are the rows after which a token is sampled, in order of the plan's batch: one for each sequence
    that samples, and one more for each of its drafts.
    """

    spans: list[Span]
    token_ids: Int64
    positions: Int64
    slot_mapping: Int64
    written_rows: Int64 | None
    sampling_rows: Int64


class PoolLimits(NamedTuple):
    """What a step must stay within, or it would read or write beside the pool."""

    block_size: int
    num_blocks: int
    max_model_len: int


def ragged_batch(scheduled: Sequence[ScheduledSequence], limits: PoolLimits) -> RaggedBatch:
    """Flatten ``scheduled``, which is not empty. Raises EngineError if one of it breaks ``limits``."""
    order = sorted(range(len(scheduled)), key=lambda index: _sort_key(scheduled[index]))
    spans: list[Span] = []
    tokens: list[int] = []
    last_rows: dict[int, int] = {}
    for index in order:
        item = scheduled[index]
        _check(item, limits)
        blocks = _block_table(item, limits.block_size)
        spans.append(Span(index, len(tokens), item.num_tokens, item.start, blocks, limits.block_size))
        tokens += item.token_ids
        last_rows[index] = len(tokens) - 1
    positions = np.concatenate([np.arange(span.start, span.context_len) for span in spans])
    slots = np.concatenate([span.slots(span.start) for span in spans])
    written = _written_rows(spans, scheduled, positions)
    sampling = [(index, back) for index, item in enumerate(scheduled) for back in _places(item)]
    return RaggedBatch(
        spans=spans,
        token_ids=np.array(tokens, np.int64),
        positions=positions,
        slot_mapping=slots if written is None else slots[written],
        written_rows=written,
        sampling_rows=np.array([last_rows[index] - back for index, back in sampling], np.int64),
    )


def _places(item: ScheduledSequence) -> range:
    """Return how far before the last row of ``item`` it samples: at the newest token and at each draft."""
    return range(len(item.drafts or ()), -1, -1) if item.samples else range(0)


def _written_rows(spans: list[Span], scheduled: Sequence[ScheduledSequence], positions: Int64) -> Int64 | None:
    """Return the rows whose KV is not there yet, or None if that is every row, as it nearly always is."""
    computed = [scheduled[span.index].sequence.num_computed_tokens for span in spans]
    if all(num_tokens <= span.start for num_tokens, span in zip(computed, spans, strict=True)):
        return None
    firsts = np.repeat(computed, [span.num_tokens for span in spans])
    return np.flatnonzero(positions >= firsts)


def _sort_key(item: ScheduledSequence) -> tuple[bool, int]:
    return item.num_tokens > 1, item.start + item.num_tokens


def _check(item: ScheduledSequence, limits: PoolLimits) -> None:
    sequence, end = item.sequence, item.start + item.num_tokens
    known = sequence.num_tokens + len(item.drafts or ())
    blocks = sequence.block_table
    reason = None
    if item.num_tokens < 1 or item.start < 0 or end > known:
        reason = f"the step wants positions {item.start} to {end} of {known} tokens"
    elif end > limits.max_model_len:
        reason = f"{end} tokens are more than the model's {limits.max_model_len}"
    elif len(blocks) * limits.block_size < end:
        reason = f"{len(blocks)} blocks of {limits.block_size} do not hold {end} tokens"
    elif min(blocks) < 0 or max(blocks) >= limits.num_blocks:
        reason = f"the block table leaves the pool of {limits.num_blocks} blocks"
    if reason is not None:
        raise EngineError(reason, request_id=sequence.spec.request_id)


def _block_table(item: ScheduledSequence, block_size: int) -> Int64:
    num_blocks = -(-(item.start + item.num_tokens) // block_size)
    return np.array(item.sequence.block_table[:num_blocks], np.int64)
