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


class _EngineCopy:
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
        self._copies: dict[Sequence, _EngineCopy] = {}
        self._left: list[SequenceId] = []
        self._ids: Iterator[int] = itertools.count(1)

    def __len__(self) -> int:
        """Return the number of sequences the engine holds."""
        return len(self._copies)

    def write(self, step: int, sequences: Iterable[Sequence], chunks: Iterable[Chunk]) -> StepPlan:
        """Return the plan that computes ``chunks[i]`` of ``sequences[i]``. Every plan must be submitted, in order.

        Raises ValueError if their numbers differ.
        """
        batch: list[ScheduledTokens] = []
        new: list[NewSequence] = []
        changed: list[SequenceChange] = []
        copies = self._copies
        for sequence, chunk in zip(sequences, chunks, strict=True):
            copy = copies.get(sequence)
            if copy is None:
                copy = copies[sequence] = _EngineCopy(SequenceId(next(self._ids)))
                new.append(_introduce(sequence, copy))
            elif (
                copy.num_blocks != len(sequence.block_table)
                or copy.num_tokens < len(sequence.token_ids)
                or copy.replaced
            ):
                changed.append(_update(sequence, copy))
            start, computed, samples = chunk.start, sequence.num_computed_tokens, chunk.samples
            if samples:
                copy.num_tokens += 1
            writes_from = start if start >= computed else computed
            batch.append(
                ScheduledTokens(copy.id, start, chunk.num_tokens, samples, writes_from, chunk.drafts, chunk.awaits)
            )
        left, self._left = self._left, []
        return StepPlan(step=step, batch=batch, new=new, changed=changed, left=left)

    def replaced(self, sequence: Sequence, blocks: Iterable[tuple[int, BlockId]]) -> None:
        """Record that ``blocks`` [(index in the table, block)] replaced others in the block table of ``sequence``."""
        copy = self._copies.get(sequence)
        if copy is not None:
            copy.replaced += [(place, block) for place, block in blocks if place < copy.num_blocks]

    def accepted(self, sequence: Sequence, num_drafts: int) -> None:
        """Record that the engine appended ``num_drafts`` drafts to ``sequence``, and the token sampled after them."""
        self._copies[sequence].num_tokens += num_drafts

    def leave(self, sequence: Sequence) -> None:
        """Have the engine drop ``sequence`` with the next plan, if it holds it."""
        copy = self._copies.pop(sequence, None)
        if copy is not None:
            self._left.append(copy.id)


def _introduce(sequence: Sequence, copy: _EngineCopy) -> NewSequence:
    copy.num_blocks, copy.num_tokens = len(sequence.block_table), len(sequence.token_ids)
    return NewSequence(
        id=copy.id,
        request_id=sequence.spec.request_id,
        token_ids=list(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        sampling=sequence.sampling,
        block_table=list(sequence.block_table),
    )


def _update(sequence: Sequence, copy: _EngineCopy) -> SequenceChange:
    change = SequenceChange(
        id=copy.id,
        block_ids=sequence.block_table[copy.num_blocks :],
        replaced=copy.replaced,
        token_ids=sequence.token_ids[copy.num_tokens :],
    )
    copy.num_blocks, copy.replaced = len(sequence.block_table), []
    copy.num_tokens = max(copy.num_tokens, len(sequence.token_ids))
    return change
