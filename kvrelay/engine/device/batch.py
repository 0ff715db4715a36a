"""Flattening a plan's batch into a step buffer: single tokens first, then tiles of longer spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import Int64, StepLimits, misplaced, outside_vocabulary
from kvrelay.engine.device.adjustments import adjusts, needs_tokens, row_adjustments
from kvrelay.engine.device.operations import MOST_LOGPROBS, StepShape
from kvrelay.engine.device.sequence_rows import Int32, SequenceRow, SequenceRows
from kvrelay.engine.device.steady_batch import LAST_SAMPLED, SteadyBatch
from kvrelay.engine.device.step_buffer import StepArrays, StepBuffer
from kvrelay.engine.device.step_slot import UploadArena
from kvrelay.engine.device.tiles import Chunk, TileCutter, Tiles
from kvrelay.engine.sampler import uniform
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.errors import EngineError
from kvrelay.protocol.messages.engine import SequenceFailed


class AwaitedTokenError(Exception):
    """A step needs a token on the host that a step before it has yet to sample."""


class Samples(NamedTuple):
    """The rows that sample, in the plan's order; after a sequence's newest token those after its drafts.

    ``step_rows``: which rows of the step; ``table_rows``: of which sequence; ``noted``: the table row if the device is
    to keep the token, else -1. ``uniforms``: random numbers. ``num_logprobs``: how many alternatives are asked for,
    None if nobody asks.
    """

    step_rows: Int32
    table_rows: Int32
    noted: Int32
    uniforms: list[float]
    num_logprobs: list[int | None] | None


class Adjustments(NamedTuple):
    """Changes of logits by sampling row: ``ends[i]`` of ``tokens`` and ``changes`` [3, n] are those of rows to i."""

    tokens: Int32
    changes: npt.NDArray[np.float32]
    ends: Int32


class Masks(NamedTuple):
    """The tokens that grammars allow: ``words`` [masks, words], and for each sampling row its mask or -1."""

    words: Int32
    by_sample: Int32


class Batch(NamedTuple):
    """A plan's batch by row: ``rows`` [4, N] as in StepArrays, ``tiles``; what samples.

    ``items`` are the sequences that are computed, in the plan's order; ``first_rows`` are their first rows. The others
    are ``failed``, by their place in the plan.
    """

    items: list[ScheduledSequence]
    failed: dict[int, SequenceFailed]
    shape: StepShape
    rows: Int32
    first_rows: list[int]
    tiles: Tiles
    samples: Samples
    adjustments: Adjustments | None
    masks: Masks | None

    @property
    def slots(self) -> Int32:
        """The slots the step writes keys and values to; below 0: none."""
        slots: Int32 = self.rows[2]
        return slots


class _Part(NamedTuple):
    """The tokens that a step computes of one sequence, and for each place that samples how its logits change.

    ``masks``: for each of these places what the sequence's grammar allows.
    """

    token_ids: list[int]
    adjustments: list[tuple[Int32, npt.NDArray[np.float32]]] | None = None
    masks: Sequence[Int32] = ()


class BatchAssembler:
    """Turns plans into batches of at most ``max_num_tokens``."""

    def __init__(self, limits: StepLimits, rows: SequenceRows, cutter: TileCutter, max_num_tokens: int) -> None:
        self._limits = limits
        self._rows = rows
        self._cutter = cutter
        self._max_num_tokens = max_num_tokens
        self._steady: SteadyBatch | None = None

    def forget_sequences(self) -> None:
        """Treat the device's block tables and last tokens as unknown."""
        self._rows.clear()
        self._steady = None

    def take_table_changes(self) -> Int32 | None:
        return self._rows.take_changes()

    def assemble(self, scheduled: list[ScheduledSequence]) -> Batch:
        """Flatten those of ``scheduled`` that are within the limits of a sequence. The batch may be empty.

        Raises EngineError if the step exceeds ``max_num_tokens``, AwaitedTokenError if it cannot be assembled yet.
        """
        if self._steady is not None:
            by_row = self._steady.advance(scheduled, self._rows, self._limits)
            if by_row is not None:
                return self._steady_batch(scheduled, self._steady, by_row)
            self._steady = None
        items: list[ScheduledSequence] = []
        parts: list[_Part] = []
        failed: dict[int, SequenceFailed] = {}
        num_masks = 0
        for place, item in enumerate(scheduled):
            part = self._part(item)
            most_masks = self._rows.num_rows - num_masks - (len(scheduled) - place - 1)  # every sequence may need one
            if item.drafts and (isinstance(part, SequenceFailed) or len(part.masks) > most_masks):
                item = item.without_drafts  # noqa: PLW2901 (a guess beyond the limits is a wrong one)
                part = self._part(item)
            if isinstance(part, SequenceFailed):
                failed[place] = part
            else:
                items.append(item)
                parts.append(part)
                num_masks += len(part.masks)
        num_tokens = sum(item.num_tokens for item in items)
        if num_tokens > self._max_num_tokens:
            raise EngineError(f"a step of {num_tokens} tokens is more than {self._max_num_tokens}")
        return self._flatten(items, parts, failed)

    def _part(self, item: ScheduledSequence) -> _Part | SequenceFailed:
        """Return what to compute of ``item``, or why it cannot be computed."""
        sequence, limits = item.sequence, self._limits
        awaited = item.awaits and item.num_tokens == 1 and item.start == sequence.num_tokens
        if failed := misplaced(item, limits, int(awaited)) or self._rows.outside_pool(sequence):
            return failed
        if awaited:
            if needs_tokens(sequence.sampling) or not self._rows.has_sampled(sequence, item.start):
                raise AwaitedTokenError
            token_ids = [LAST_SAMPLED]
        else:
            token_ids = [sequence.token_ids[item.start]] if item.num_tokens == 1 else item.token_ids
            if failed := outside_vocabulary(token_ids, limits.vocab_size):
                return failed
        if failed := _too_many_logprobs(item):
            return failed
        if not (item.samples and (sequence.constraint is not None or adjusts(sequence.sampling))):
            return _Part(token_ids)
        try:
            return _changed_part(item, token_ids, limits.vocab_size)
        except Exception as error:  # the border of a sequence, as in the host's sampler
            reason = error.message if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            position = item.start + item.num_tokens - sequence.num_prompt_tokens - len(item.drafts or ())
            return SequenceFailed(f"output position {position} cannot be sampled: {reason}")

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
        samples = _samples(items, rows, first_rows)
        adjustments, masks = _adjustments(items, parts), _masks(items, parts)
        if not failed and adjustments is None and masks is None and all(_is_plain_decode(item) for item in items):
            self._steady = SteadyBatch(items, rows)
        paged, dense, pieces = (one.shape[1] for one in tiles)
        return Batch(
            items=items,
            failed=failed,
            shape=StepShape(by_row.shape[1], singles, paged, len(samples.uniforms), dense, pieces),
            rows=by_row,
            first_rows=first_rows,
            tiles=tiles,
            samples=samples,
            adjustments=adjustments,
            masks=masks,
        )

    def _steady_batch(self, items: list[ScheduledSequence], steady: SteadyBatch, by_row: Int32) -> Batch:
        """Return the batch of decodes that go on: each has one row, in the plan's order."""
        count = len(items)
        places = range(count)
        samples = Samples(
            step_rows=np.arange(count, dtype=np.int32),
            table_rows=steady.index,
            noted=steady.index,
            uniforms=[_uniform(item, row, 0) for item, row in zip(items, steady.rows, strict=True)],
            num_logprobs=_num_logprobs(items),
        )
        shape = StepShape(count, count, 0, count)
        return Batch(items, {}, shape, by_row, list(places), self._cutter.cut([]), samples, None, None)

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

    def fill(self, buffer: StepBuffer, arena: UploadArena, batch: Batch) -> None:
        """Start the copy of ``batch`` to ``buffer``."""
        arrays = buffer.stage(arena)
        rows, _, paged, count, dense, pieces = batch.shape
        arrays.rows[:, :rows] = batch.rows
        arrays.tiles[:, :paged] = batch.tiles.paged
        arrays.dense_tiles[:, :dense] = batch.tiles.dense
        arrays.pieces[:, :pieces] = batch.tiles.pieces
        if count:
            self._fill_samples(arrays, batch)
            if batch.adjustments is not None:
                tokens, changes, ends = batch.adjustments
                arrays.numbers[3, 1:count], arrays.numbers[4, :count] = ends[:-1], ends
                buffer.upload_adjustments(arena, tokens, changes)
            if batch.masks is not None:
                arrays.numbers[5, :count] = batch.masks.by_sample
        buffer.upload(arrays)

    def _fill_samples(self, arrays: StepArrays, batch: Batch) -> None:
        samples, count = batch.samples, batch.shape.samples
        arrays.sample_rows[:count] = samples.step_rows
        arrays.reals[0, :count] = samples.uniforms
        arrays.reals[1:, :count] = self._rows.reals[:, samples.table_rows]
        arrays.numbers[:2, :count] = self._rows.numbers[:, samples.table_rows]
        arrays.numbers[2, :count] = samples.noted


def _changed_part(item: ScheduledSequence, token_ids: list[int], vocab_size: int) -> _Part:
    """Return the part of ``item``, whose logits change. Raises EngineError if they cannot."""
    sequence, places = item.sequence, range(len(item.drafts or ()) + 1)
    adjustments = None
    if adjusts(sequence.sampling):
        adjustments = [row_adjustments(item, ahead, vocab_size) for ahead in places]
    if sequence.constraint is None:
        return _Part(token_ids, adjustments)
    return _Part(token_ids, adjustments, [sequence.constraint.words(sequence.num_output_tokens + at) for at in places])


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


def _masks(items: list[ScheduledSequence], parts: list[_Part]) -> Masks | None:
    """Return the masks of all sampling rows, None if there are none."""
    words = [mask for part in parts for mask in part.masks]
    if not words:
        return None
    by_sample: list[int] = []
    num_masks = 0
    for item, part in zip(items, parts, strict=True):
        count = len(item.drafts or ()) + 1 if item.samples else 0
        by_sample += range(num_masks, num_masks + count) if part.masks else [-1] * count
        num_masks += len(part.masks)
    return Masks(np.stack(words), np.array(by_sample, np.int32))


def _samples(items: list[ScheduledSequence], rows: list[SequenceRow], first_rows: list[int]) -> Samples:
    """Return what samples, and note in ``rows`` which token the device will have of each."""
    step_rows, table_rows, noted, uniforms = [], [], [], []
    for item, row, first in zip(items, rows, first_rows, strict=True):
        if not item.samples:
            continue
        num_drafts = len(item.drafts or ())
        row.sampled = item.start + item.num_tokens - num_drafts
        for ahead in range(num_drafts + 1):
            step_rows.append(first + item.num_tokens - 1 - num_drafts + ahead)
            table_rows.append(row.index)
            noted.append(row.index if ahead == 0 else -1)  # not the tokens after drafts
            uniforms.append(_uniform(item, row, ahead))
    return Samples(
        step_rows=np.array(step_rows, np.int32),
        table_rows=np.array(table_rows, np.int32),
        noted=np.array(noted, np.int32),
        uniforms=uniforms,
        num_logprobs=_num_logprobs(items),
    )


def _num_logprobs(items: list[ScheduledSequence]) -> list[int | None] | None:
    """Return for each sampling row how many log probabilities are asked for, None if nobody asks."""
    if all(item.sequence.sampling.num_logprobs is None for item in items):
        return None
    return [
        item.sequence.sampling.num_logprobs for item in items if item.samples for _ in range(len(item.drafts or ()) + 1)
    ]


def _uniform(item: ScheduledSequence, row: SequenceRow, ahead: int) -> float:
    """Return the random number of the token that is sampled after the first ``ahead`` drafts."""
    if not row.draws:
        return 0.0
    return uniform(item.sequence.sampling.seed, item.start + item.num_tokens - len(item.drafts or ()) + ahead)


def _is_plain_decode(item: ScheduledSequence) -> bool:
    return item.num_tokens == 1 and item.samples and item.drafts is None and item.writes_from <= item.start
