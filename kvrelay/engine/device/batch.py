"""Flattening a plan's batch into a step buffer: single tokens first, then tiles of longer spans."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.core.errors import EngineError
from kvrelay.core.ids import BlockId
from kvrelay.core.step import ScheduledSequence
from kvrelay.engine.device.adjustments import row_adjustments
from kvrelay.engine.device.operations import StepShape
from kvrelay.engine.device.sequence_rows import Int32, SequenceRow, SequenceRows
from kvrelay.engine.device.step_buffer import StepBuffer
from kvrelay.engine.sampler import uniform


class BatchLimits(NamedTuple):
    """What a step must stay within, or it would read or write beside the pool and the tables."""

    block_size: int
    max_model_len: int
    max_num_tokens: int
    vocab_size: int


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
    """A plan's batch by row: ``rows`` [4, N] and ``tiles`` [4, T] as in StepBuffer; what samples, in the plan's order.

    ``foreign``: blocks with KV that the device has not seen.
    """

    shape: StepShape
    rows: Int32
    tiles: Int32
    samples: list[Sample]
    adjustments: Adjustments | None
    foreign: list[BlockId]

    @property
    def slots(self) -> Int32:
        """The slots the step writes keys and values to; below 0: none."""
        slots: Int32 = self.rows[2]
        return slots


class BatchAssembler:
    """Turns plans into batches. ``tile_rows``: how many consecutive queries form a tile at most."""

    def __init__(self, limits: BatchLimits, rows: SequenceRows, tile_rows: int) -> None:
        self._limits = limits
        self._rows = rows
        self._tile_rows = tile_rows

    def assemble(self, scheduled: list[ScheduledSequence]) -> Batch:
        """Flatten ``scheduled``. Raises EngineError if it is empty or breaks a limit."""
        if not scheduled:
            raise EngineError("a step without sequences")
        num_tokens, most = sum(item.num_tokens for item in scheduled), self._limits.max_num_tokens
        if num_tokens > most:
            raise EngineError(f"a step of {num_tokens} tokens is more than max_num_batched_tokens {most}")
        rows = self._rows.take(scheduled)
        for item, row in zip(scheduled, rows, strict=True):
            self._check(item, row)
        order = sorted(range(len(scheduled)), key=lambda index: scheduled[index].num_tokens > 1)
        singles = sum(item.num_tokens == 1 for item in scheduled)
        counts = np.array([scheduled[index].num_tokens for index in order])
        ends = np.cumsum(counts)
        by_row = self._by_row([scheduled[index] for index in order], [rows[index] for index in order], counts, ends)
        tiles = self._tiles([(scheduled[index], rows[index]) for index in order[singles:]], singles)
        last_rows = dict(zip(order, (ends - 1).tolist(), strict=True))
        samples = [
            Sample(item, rows[index], ahead, last_rows[index] - len(item.drafts or ()) + ahead)
            for index, item in enumerate(scheduled)
            if item.samples
            for ahead in range(len(item.drafts or ()) + 1)
        ]
        shape = StepShape(by_row.shape[1], singles, tiles.shape[1], len(samples))
        adjustments = self._adjustments(samples)
        foreign = [block for item, row in zip(scheduled, rows, strict=True) for block in self._foreign(item, row)]
        return Batch(shape, by_row, tiles, samples, adjustments, foreign)

    def _check(self, item: ScheduledSequence, row: SequenceRow) -> None:
        sequence, start, num_tokens, _, drafts = item
        end, limits = start + num_tokens, self._limits
        reason = None
        if num_tokens < 1 or start < 0 or end > len(sequence.token_ids) + len(drafts or ()):
            reason = f"the step wants positions {start} to {end} of {sequence.num_tokens} tokens"
        elif end > limits.max_model_len:
            reason = f"{end} tokens are more than the model's {limits.max_model_len}"
        elif end > row.num_blocks * limits.block_size:
            reason = f"{row.num_blocks} blocks of {limits.block_size} do not hold {end} tokens"
        if reason is not None:
            raise EngineError(reason, request_id=sequence.spec.request_id)

    def _foreign(self, item: ScheduledSequence, row: SequenceRow) -> array[int]:
        """Return the blocks of context that the device lacks, and note that it has them all after this step."""
        size, first = self._limits.block_size, row.resident
        there = max(item.start, item.sequence.num_computed_tokens)
        row.resident = max(item.start + item.num_tokens - len(item.drafts or ()), there)
        return row.table[first // size : -(-there // size)] if there > first else row.table[:0]

    def _by_row(
        self, items: list[ScheduledSequence], rows: list[SequenceRow], counts: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
    ) -> Int32:  # fmt: skip
        """Return token, position, slot and table row of every row."""
        result = np.empty((4, int(ends[-1])), np.int32)
        tokens, positions, slots, table_rows = result
        tokens[:] = _tokens(items)
        self._check_tokens(tokens)
        starts = np.array([item.start for item in items])
        table_rows[:] = np.repeat(np.array([row.index for row in rows]), counts)
        positions[:] = np.arange(len(tokens)) - np.repeat(ends - counts - starts, counts)
        size = self._limits.block_size
        slots[:] = self._rows.tables[table_rows, positions // size] * size + positions % size
        computed = np.array([item.sequence.num_computed_tokens for item in items])
        if (computed > starts).any():  # some of the KV is there already
            slots[positions < np.repeat(computed, counts)] = -1
        return result

    def _check_tokens(self, tokens: Int32) -> None:
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= self._limits.vocab_size:
            raise EngineError(f"token ids {lowest} to {highest} leave the vocabulary of {self._limits.vocab_size}")

    def _tiles(self, chunks: list[tuple[ScheduledSequence, SequenceRow]], first_row: int) -> Int32:
        """Cut ``chunks``, whose rows begin at ``first_row``, into tiles, those with the longest context first."""
        tiles: list[tuple[int, int, int, int]] = []
        for item, row in chunks:
            for begin in range(0, item.num_tokens, self._tile_rows):
                count = min(self._tile_rows, item.num_tokens - begin)
                tiles.append((first_row + begin, count, item.start + begin, row.index))
            first_row += item.num_tokens
        tiles.sort(key=lambda tile: -tile[2])
        return np.array(tiles, np.int32).reshape(-1, 4).T

    def _adjustments(self, samples: list[Sample]) -> Adjustments | None:
        if not any(sample.row.adjusts for sample in samples):
            return None
        parts = [
            row_adjustments(sample.item, sample.ahead, self._limits.vocab_size) if sample.row.adjusts else None
            for sample in samples
        ]
        ends = np.cumsum([0 if part is None else len(part[0]) for part in parts], dtype=np.int32)
        changed = [part for part in parts if part is not None]
        tokens, changes = (np.concatenate(one, axis=-1) for one in zip(*changed, strict=True))
        return Adjustments(tokens, changes, ends)

    def fill(self, buffer: StepBuffer, batch: Batch) -> None:
        """Put ``batch`` into ``buffer`` and start its copy to the device."""
        buffer.reset()
        rows, _, tiles, count = batch.shape
        buffer.rows[:, :rows] = batch.rows
        buffer.tiles[:, :tiles] = batch.tiles
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


def _tokens(items: list[ScheduledSequence]) -> list[int]:
    tokens: list[int] = []
    for item in items:
        if item.num_tokens == 1:
            tokens.append(item.sequence.token_ids[item.start])
        else:
            tokens += item.token_ids
    return tokens


def _uniform(sample: Sample) -> float:
    if not sample.row.draws:
        return 0.0
    sequence = sample.item.sequence
    return uniform(sequence.sampling.seed, sequence.num_tokens + sample.ahead)
