"""The batch that decodes go on in: the same sequences in the same order, each one token further.

Most steps of a node that decodes are of this kind. Their rows change by arithmetic on arrays, not one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvrelay.engine.batch import Int64, StepLimits
from kvrelay.engine.device.sequence_rows import Int32, SequenceRow, SequenceRows
from kvrelay.engine.sequences import ScheduledSequence

LAST_SAMPLED = -1
"""In place of a token id: the one that the device sampled last for the row."""


class SteadyBatch:
    """Plain decodes, as a step left them: ``rows`` of their sequences, each with its next token at ``starts``."""

    def __init__(self, items: Sequence[ScheduledSequence], rows: list[SequenceRow]) -> None:
        self.rows = rows
        self.index: Int32 = np.array([row.index for row in rows], np.int32)
        self._sequences = [item.sequence for item in items]
        self._starts: Int64 = np.array([item.start + 1 for item in items], np.int64)

    def advance(self, items: Sequence[ScheduledSequence], known: SequenceRows, limits: StepLimits) -> Int32 | None:
        """Return token, position, slot and table row [4, N] of ``items``; None if they are not the next of this batch.

        Nothing has changed then, and whoever assembles them one by one finds out why.
        """
        starts = self._starts
        if not self._continues(items) or int(starts.max()) >= limits.max_model_len:
            return None
        tokens = self._tokens(items, limits.vocab_size)
        grown = [row for row in self.rows if len(row.table) != row.num_blocks]
        covered = np.array([len(sequence.block_table) for sequence in self._sequences]) * limits.block_size
        if tokens is None or (covered <= starts).any() or any(map(known.outside_pool, (row.sequence for row in grown))):
            return None
        for row in grown:
            known.add_blocks(row)
        result = np.empty((4, len(items)), np.int32)
        result[0], result[1], result[3] = tokens, starts, self.index
        blocks = known.tables[self.index, starts // limits.block_size]
        result[2] = blocks * limits.block_size + starts % limits.block_size
        for row, start in zip(self.rows, starts.tolist(), strict=True):
            row.resident = row.sampled = start + 1
        self._starts = starts + 1
        return result

    def _continues(self, items: Sequence[ScheduledSequence]) -> bool:
        """Return whether ``items`` are plain decodes of these sequences, one token further."""
        return (
            [item.sequence for item in items] == self._sequences
            and [item.start for item in items] == self._starts.tolist()
            and all(
                item.samples and item.num_tokens == 1 and item.drafts is None and item.writes_from <= item.start
                for item in items
            )
            and all(row.is_current for row in self.rows)
        )

    def _tokens(self, items: Sequence[ScheduledSequence], vocab_size: int) -> Int32 | None:
        """Return the newest token of each item, None if one is missing or wrong."""
        tokens = np.array(
            [
                LAST_SAMPLED if item.awaits and item.start == len(item.sequence.token_ids) else _token_at(item)
                for item in items
            ]
        )
        return None if tokens.min() < LAST_SAMPLED or tokens.max() >= vocab_size else tokens.astype(np.int32)


def _token_at(item: ScheduledSequence) -> int:
    """Return the newest token, below LAST_SAMPLED if it is not there or no token."""
    ids = item.sequence.token_ids
    return ids[item.start] if item.start < len(ids) and ids[item.start] >= 0 else LAST_SAMPLED - 1
