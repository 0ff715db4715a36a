"""What the device keeps of sequences from step to step: a row each, with the block table and the sampling parameters.

A step then names rows. Only blocks that were appended since the sequence's last step travel to the device.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import outside_pool
from kvrelay.engine.sampler import GREEDY_BELOW
from kvrelay.engine.sequences import EngineSequence, ScheduledSequence
from kvrelay.errors import EngineError
from kvrelay.protocol.messages.engine import SequenceFailed

Int32 = npt.NDArray[np.int32]

_ALL = (1 << 31) - 1
"""A top_k that leaves every token."""


class SequenceRow:
    """The row ``index`` of one sequence.

    It has the first ``num_blocks`` blocks of the sequence's table, as they are after ``num_replacements``.
    ``draws``: tokens are not greedy. ``sampled``: the place in the sequence of the token that the device keeps as the
    last one it sampled for this row; -1: none.
    """

    __slots__ = ("draws", "index", "num_blocks", "num_replacements", "sampled", "sequence")

    def __init__(self, index: int, sequence: EngineSequence) -> None:
        self.index = index
        self.sequence = sequence
        self.num_replacements = sequence.num_replacements
        self.num_blocks = 0
        self.sampled = -1
        self.draws = sequence.sampling.temperature >= GREEDY_BELOW

    @property
    def is_current(self) -> bool:
        """Whether no block that the row has was replaced by another."""
        return self.num_replacements == self.sequence.num_replacements

    @property
    def table(self) -> array[int]:
        """The block table of the sequence."""
        return self.sequence.block_table


class SequenceRows:
    """Rows for the sequences of the last steps. Sequences that have ended give theirs up when another needs it.

    ``tables`` [rows, blocks] is the host's copy of the device's. ``reals`` [3, rows]: temperature, top_p, min_p.
    ``numbers`` [2, rows]: top_k, number of logprobs or -1.
    """

    def __init__(self, num_rows: int, max_blocks: int, num_pool_blocks: int) -> None:
        self.tables: Int32 = np.zeros((num_rows, max_blocks), np.int32)
        self.reals: npt.NDArray[np.float64] = np.zeros((3, num_rows))
        self.numbers: Int32 = np.zeros((2, num_rows), np.int32)
        self.num_rows = num_rows
        self._num_pool_blocks = num_pool_blocks
        self._free = list(range(num_rows - 1, -1, -1))
        self._rows: OrderedDict[EngineSequence, SequenceRow] = OrderedDict()
        self._places: list[int] = []
        self._blocks: list[int] = []

    def clear(self) -> None:
        """Forget every sequence: their block tables and last tokens are sent again."""
        self._free += [row.index for row in self._rows.values()]
        self._rows.clear()
        self._places, self._blocks = [], []

    def has_sampled(self, sequence: EngineSequence, place: int) -> bool:
        """Return whether the device has sampled, or is going to, the token at ``place`` of ``sequence``."""
        row = self._rows.get(sequence)
        return row is not None and row.sampled == place

    def outside_pool(self, sequence: EngineSequence) -> SequenceFailed | None:
        """Return the failure of ``sequence`` if blocks that it has now and its row does not are outside the pool."""
        table, row = sequence.block_table, self._rows.get(sequence)
        first = row.num_blocks if row is not None and row.is_current else 0
        if len(table) <= first:
            return None
        return outside_pool(np.frombuffer(table, np.int32)[first:], self._num_pool_blocks)

    def take(self, batch: list[ScheduledSequence]) -> list[SequenceRow]:
        """Return the rows of ``batch``, brought up to date with the sequences' block tables.

        Raises EngineError if they are too many.

        The whole table of a sequence is sent again if blocks of it were replaced.
        """
        if len(batch) > len(self.tables):
            raise EngineError(f"a step of {len(batch)} sequences is more than max_num_seqs {len(self.tables)}")
        known = self._rows
        for item in batch:
            if item.sequence in known:
                known.move_to_end(item.sequence)
        rows = []
        for item in batch:
            sequence = item.sequence
            row = known.get(sequence)
            if row is None or not row.is_current:
                sampled = -1 if row is None else row.sampled
                row = known[sequence] = self._new_row(sequence, row)
                row.sampled = sampled
            if len(row.table) != row.num_blocks:
                self.add_blocks(row)
            rows.append(row)
        return rows

    def _new_row(self, sequence: EngineSequence, old: SequenceRow | None) -> SequenceRow:
        if old is None and not self._free:
            _, old = self._rows.popitem(last=False)
        row = SequenceRow(old.index if old is not None else self._free.pop(), sequence)
        params = sequence.sampling
        self.reals[:, row.index] = params.temperature, params.top_p, params.min_p
        top_k = min(params.top_k, _ALL)
        self.numbers[:, row.index] = top_k, -1 if params.num_logprobs is None else params.num_logprobs
        return row

    def add_blocks(self, row: SequenceRow) -> None:
        """Take in the blocks that were appended to the table of the row's sequence."""
        first, last = row.num_blocks, min(len(row.table), self.tables.shape[1])
        blocks = row.table[first:last]
        self.tables[row.index, first:last] = blocks
        start = row.index * self.tables.shape[1]
        self._places.extend(range(start + first, start + last))
        self._blocks.extend(blocks)
        row.num_blocks = last

    def take_changes(self) -> Int32 | None:
        """Return flat places of the device's tables and what to put there, int32 [2, count], once; None if none."""
        if not self._places:
            return None
        changes = np.array([self._places, self._blocks], np.int32)
        self._places, self._blocks = [], []
        return changes
