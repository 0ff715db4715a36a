"""Flattening a plan's batch into a step buffer: single tokens first, then tiles of longer spans."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import Int64, StepLimits, misplaced, outside_vocabulary
from kvrelay.engine.device.adjustments import adjusts, row_adjustments
from kvrelay.engine.device.operations import MOST_LOGPROBS, StepShape
from kvrelay.engine.device.sequence_rows import Int32, SequenceRow, SequenceRows
from kvrelay.engine.device.step_buffer import StepBuffer
from kvrelay.engine.device.tiles import Chunk, TileCutter, Tiles
from kvrelay.engine.sampler import uniform
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.errors import EngineError
from kvrelay.protocol.messages.engine import SequenceFailed


class Sample(NamedTuple):
    """A row that samples: of ``item``, after the first ``ahead`` of its drafts."""

    item: ScheduledSequence
    row: SequenceRow
    ahead: int
    step_row: int


class Adjustments(NamedTuple):
    """Changes of logits by sampling row: ``ends[i]`` of ``tokens`` and ``changes`` [3, n] are those of rows to i."""

    tokens: Int32
    changes: npt.NDArray[np.float32]
    ends: Int32


class Batch(NamedTuple):
    """A plan's batch by row: ``rows`` [4, N] as in StepBuffer, ``tiles``; what samples, in the plan's order.

    ``items`` are the sequences that are computed, in the plan's order; ``first_rows`` are their first rows. The others
    are ``failed``, by their place in the plan.
    """

    items: list[ScheduledSequence]
    failed: dict[int, SequenceFailed]
    shape: StepShape
    rows: Int32
    first_rows: list[int]
    tiles: Tiles
    samples: list[Sample]
    adjustments: Adjustments | None

    @property
    def slots(self) -> Int32:
        """The slots the step writes keys and values to; below 0: none."""
        slots: Int32 = self.rows[2]
        return slots


class _Part(NamedTuple):
    """The tokens that a step computes of one sequence, and for each place that samples how its logits change."""

    token_ids: list[int]
    adjustments: list[tuple[Int32, npt.NDArray[np.float32]]] | None


class BatchAssembler:
    """Turns plans into batches of at most ``max_num_tokens``."""

    def __init__(self, limits: StepLimits, rows: SequenceRows, cutter: TileCutter, max_num_tokens: int) -> None:
        self._limits = limits
        self._rows = rows
        self._cutter = cutter
        self._max_num_tokens = max_num_tokens

    def assemble(self, scheduled: list[ScheduledSequence]) -> Batch:
        """Flatten those of ``scheduled`` that are within the limits of a sequence; perhaps there are none.

        Raises EngineError if they are too much together.
        """
        items: list[ScheduledSequence] = []
        parts: list[_Part] = []
        failed: dict[int, SequenceFailed] = {}
        for place, item in enumerate(scheduled):
            part = self._part(item)
            if isinstance(part, SequenceFailed) and item.drafts:
                item = item.without_drafts  # noqa: PLW2901 (a guess beyond the limits is a wrong one)
                part = self._part(item)
            if isinstance(part, SequenceFailed):
                failed[place] = part
            else:
                items.append(item)
                parts.append(part)
        num_tokens = sum(item.num_tokens for item in items)
        if num_tokens > self._max_num_tokens:
            raise EngineError(f"a step of {num_tokens} tokens is more than {self._max_num_tokens}")
        return self._flatten(items, parts, failed)

    def _part(self, item: ScheduledSequence) -> _Part | SequenceFailed:
        """Return what to compute of ``item``, or why it cannot be computed."""
        sequence, limits = item.sequence, self._limits
        if failed := misplaced(item, limits) or self._rows.outside_pool(sequence):
            return failed
        token_ids = [sequence.token_ids[item.start]] if item.num_tokens == 1 else item.token_ids
        if failed := outside_vocabulary(token_ids, limits.vocab_size) or _too_many_logprobs(item):
            return failed
        if not (item.samples and adjusts(sequence.sampling)):
            return _Part(token_ids, None)
        try:
            places = range(len(item.drafts or ()) + 1)
            return _Part(token_ids, [row_adjustments(item, ahead, limits.vocab_size) for ahead in places])
        except Exception as error:  # the border of a sequence, as in the host's sampler
            reason = error.message if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            return SequenceFailed(f"output position {sequence.num_output_tokens} cannot be sampled: {reason}")

    def _flatten(self, items: list[ScheduledSequence], parts: list[_Part], failed: dict[int, SequenceFailed]) -> Batch:
        rows = self._rows.take(items)
        order = sorted(range(len(items)), key=lambda index: items[index].num_tokens > 1)
        singles = sum(item.num_tokens == 1 for item in items)
        counts = np.array([items[index].num_tokens for index in order], np.int64)
        firsts = np.cumsum(counts) - counts
        by_row = self._by_row([(items[index], rows[index]) for index in order], counts, firsts)
        by_row[0] = [token for index in order for token in parts[index].token_ids]
        first_rows = [0] * len(items)
        for index, first in zip(order, firsts.tolist(), strict=True):
            first_rows[index] = first
        chunks = [
            Chunk(first_rows[index], items[index].num_tokens, items[index].start, rows[index].index)
            for index in order[singles:]
        ]
        tiles = self._cutter.cut(chunks)
        samples = [
            Sample(item, row, ahead, first + item.num_tokens - 1 - len(item.drafts or ()) + ahead)
            for item, row, first in zip(items, rows, first_rows, strict=True)
            if item.samples
            for ahead in range(len(item.drafts or ()) + 1)
        ]
        paged, dense, pieces = (one.shape[1] for one in tiles)
        return Batch(
            items=items,
            failed=failed,
            shape=StepShape(by_row.shape[1], singles, paged, len(samples), dense, pieces),
            rows=by_row,
            first_rows=first_rows,
            tiles=tiles,
            samples=samples,
            adjustments=_adjustments(items, parts),
        )

    def _by_row(self, items: list[tuple[ScheduledSequence, SequenceRow]], counts: Int64, firsts: Int64) -> Int32:
        """Return position, slot and table row of every row, after room for its token."""
        result = np.zeros((4, int(counts.sum())), np.int32)
        _, positions, slots, table_rows = result
        starts = np.array([item.start for item, _ in items], np.int64)
        table_rows[:] = np.repeat(np.array([row.index for _, row in items], np.int64), counts)
        positions[:] = np.arange(len(positions)) - np.repeat(firsts - starts, counts)
        size = self._limits.block_size
        slots[:] = self._rows.tables[table_rows, positions // size] * size + positions % size
        writes_from = np.array([item.writes_from for item, _ in items], np.int64)
        if (writes_from > starts).any():  # some of the KV is there already
            slots[positions < np.repeat(writes_from, counts)] = -1
        return result

    def fill(self, buffer: StepBuffer, batch: Batch) -> None:
        """Put ``batch`` into ``buffer`` and start its copy to the device."""
        buffer.reset()
        rows, _, paged, count, dense, pieces = batch.shape
        buffer.rows[:, :rows] = batch.rows
        buffer.tiles[:, :paged] = batch.tiles.paged
        buffer.dense_tiles[:, :dense] = batch.tiles.dense
        buffer.pieces[:, :pieces] = batch.tiles.pieces
        if count:
            self._fill_samples(buffer, batch)
        buffer.upload()

    def _fill_samples(self, buffer: StepBuffer, batch: Batch) -> None:
        samples, count = batch.samples, len(batch.samples)
        buffer.sample_rows[:count] = [sample.step_row for sample in samples]
        index = np.array([sample.row.index for sample in samples])
        buffer.reals[0, :count] = [_uniform(sample) for sample in samples]
        buffer.reals[1:, :count] = self._rows.reals[:, index]
        buffer.numbers[:2, :count] = self._rows.numbers[:, index]
        buffer.numbers[2, :count] = np.where([sample.ahead for sample in samples], -1, index)
        if batch.adjustments is not None:
            tokens, changes, ends = batch.adjustments
            buffer.numbers[3, 1:count], buffer.numbers[4, :count] = ends[:-1], ends
            buffer.upload_adjustments(tokens, changes)


def _too_many_logprobs(item: ScheduledSequence) -> SequenceFailed | None:
    asked = item.sequence.sampling.num_logprobs
    if asked is None or asked <= MOST_LOGPROBS:
        return None
    return SequenceFailed(f"{asked} log probabilities are more than {MOST_LOGPROBS}")


def _adjustments(items: list[ScheduledSequence], parts: list[_Part]) -> Adjustments | None:
    """Return how the logits of all sampling rows change, None if none do."""
    if all(part.adjustments is None for part in parts):
        return None
    changed: list[tuple[Int32, npt.NDArray[np.float32]]] = []
    counts: list[int] = []
    for item, part in zip(items, parts, strict=True):
        if part.adjustments is not None:
            changed += part.adjustments
            counts += (len(tokens) for tokens, _ in part.adjustments)
        elif item.samples:
            counts += [0] * (len(item.drafts or ()) + 1)
    tokens, changes = (np.concatenate(one, axis=-1) for one in zip(*changed, strict=True))
    return Adjustments(tokens, changes, np.cumsum(counts, dtype=np.int32))


def _uniform(sample: Sample) -> float:
    if not sample.row.draws:
        return 0.0
    sequence = sample.item.sequence
    return uniform(sequence.sampling.seed, sequence.num_tokens + sample.ahead)
