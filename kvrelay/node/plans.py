"""Builds a node's step plans: the tokens to compute, and the changes of sequence state the engine needs for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import msgspec

from kvrelay.protocol.ids import BlockId, SequenceId
from kvrelay.protocol.messages.engine import NewSequence, ScheduledTokens, SequenceChange, StepPlan
from kvrelay.protocol.request import Sequence


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Scheduled tokens of one sequence. The fields are those of ScheduledTokens."""

    start: int
    num_tokens: int
    samples: bool
    drafts: tuple[int, ...] | None = None
    awaits: bool = False

    @property
    def end(self) -> int:
        """The position after the last token, including drafts."""
        return self.start + self.num_tokens


class _Told:
    """The engine's state of one sequence after all plans written so far."""

    __slots__ = ("id", "num_blocks", "num_tokens", "replaced")

    def __init__(self, id: SequenceId) -> None:
        self.id = id
        self.num_blocks = 0
        self.num_tokens = 0
        self.replaced: list[tuple[int, BlockId]] = []


class PlanWriter:
    """Turns scheduling decisions into plans for one engine, and tracks the state sent in each plan.

    The caller reports replaced blocks (``replaced``), accepted drafts (``accepted``) and ended sequences (``leave``).
    All other changes are found by comparison with the tracked state.
    """

    def __init__(self) -> None:
        self._told: dict[Sequence, _Told] = {}
        self._left: list[SequenceId] = []
        self._ids: Iterator[int] = itertools.count(1)

    def __len__(self) -> int:
        """Return the number of sequences the engine holds."""
        return len(self._told)

    def write(self, step: int, sequences: Iterable[Sequence], chunks: Iterable[Chunk]) -> StepPlan:
        """Return the plan that computes ``chunks[i]`` of ``sequences[i]``. Every plan must be submitted, in order.

        Raises ValueError if their numbers differ.
        """
        batch: list[ScheduledTokens] = []
        new: list[NewSequence] = []
        changed: list[SequenceChange] = []
        told_of = self._told
        for sequence, chunk in zip(sequences, chunks, strict=True):
            told = told_of.get(sequence)
            if told is None:
                told = told_of[sequence] = _Told(SequenceId(next(self._ids)))
                new.append(_introduce(sequence, told))
            elif (
                told.num_blocks != len(sequence.block_table)
                or told.num_tokens < len(sequence.token_ids)
                or told.replaced
            ):
                changed.append(_update(sequence, told))
            start, computed, samples = chunk.start, sequence.num_computed_tokens, chunk.samples
            if samples:
                told.num_tokens += 1
            writes_from = start if start >= computed else computed
            batch.append(
                ScheduledTokens(told.id, start, chunk.num_tokens, samples, writes_from, chunk.drafts, chunk.awaits)
            )
        left, self._left = self._left, []
        return StepPlan(step=step, batch=batch, new=new, changed=changed, left=left)

    def replaced(self, sequence: Sequence, blocks: Iterable[tuple[int, BlockId]]) -> None:
        """Record that ``blocks`` [(index in the table, block)] replaced others in the block table of ``sequence``."""
        told = self._told.get(sequence)
        if told is not None:
            told.replaced += [(place, block) for place, block in blocks if place < told.num_blocks]

    def accepted(self, sequence: Sequence, num_drafts: int) -> None:
        """Record that the engine appended ``num_drafts`` drafts to ``sequence``, and the token sampled after them."""
        self._told[sequence].num_tokens += num_drafts

    def leave(self, sequence: Sequence) -> None:
        """Have the engine drop ``sequence`` with the next plan, if it holds it."""
        told = self._told.pop(sequence, None)
        if told is not None:
            self._left.append(told.id)


def _introduce(sequence: Sequence, told: _Told) -> NewSequence:
    told.num_blocks, told.num_tokens = len(sequence.block_table), len(sequence.token_ids)
    return NewSequence(
        id=told.id,
        request_id=sequence.spec.request_id,
        token_ids=list(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        sampling=sequence.sampling,
        block_table=list(sequence.block_table),
    )


def _update(sequence: Sequence, told: _Told) -> SequenceChange:
    change = SequenceChange(
        id=told.id,
        block_ids=sequence.block_table[told.num_blocks :],
        replaced=told.replaced,
        token_ids=sequence.token_ids[told.num_tokens :],
    )
    told.num_blocks, told.replaced = len(sequence.block_table), []
    told.num_tokens = max(told.num_tokens, len(sequence.token_ids))
    return change
