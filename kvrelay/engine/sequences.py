"""The engine's copies of the sequences that it computes. Plans update them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future

import msgspec

from kvrelay.grammar.constraint import GrammarConstraint, Wanted
from kvrelay.grammar.masks import GrammarMasks
from kvrelay.protocol.ids import BlockId, RequestId, SequenceId
from kvrelay.protocol.messages.engine import (
    NewSequence,
    SampledTokens,
    SequenceChange,
    SequenceOutcome,
    StepPlan,
    StepResult,
)
from kvrelay.protocol.request import SamplingParams, TokenSequence

NOBODY = NewSequence(
    id=SequenceId(0),
    request_id=RequestId(""),
    token_ids=[],
    num_prompt_tokens=0,
    sampling=SamplingParams(max_tokens=0, seed=0),
    block_table=[],
)


class EngineSequence(TokenSequence):
    """A sequence, from the plan that introduces it to the plan in which it leaves.

    ``block_table`` is an array of 32-bit integers that kernels read without a copy. Growing it creates a new array, so
    existing views stay valid. ``num_replacements`` counts blocks of it that were replaced by others.
    """

    __slots__ = ("block_table", "id", "num_replacements", "request_id")

    def __init__(self, new: NewSequence) -> None:
        super().__init__(list(new.token_ids), new.num_prompt_tokens, new.sampling)
        self.id = new.id
        self.request_id = new.request_id
        self.block_table = array("i", new.block_table)
        self.num_replacements = 0

    def change(self, change: SequenceChange) -> None:
        """Apply a change from the machine."""
        for place, block in change.replaced:
            self.block_table[place] = block
        self.num_replacements += len(change.replaced)
        if change.block_ids:
            self.block_table = self.block_table + array("i", change.block_ids)
        self.token_ids += change.token_ids

    def take_blocks(self, block_ids: Iterable[BlockId]) -> None:
        """Replace the block table by ``block_ids``."""
        self.block_table = array("i", block_ids)


class ScheduledSequence(msgspec.Struct, frozen=True):
    """ScheduledTokens with the sequence instead of its id."""

    sequence: EngineSequence
    start: int
    num_tokens: int
    samples: bool
    writes_from: int
    drafts: tuple[int, ...] | None = None
    awaits: bool = False

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        drafts = self.drafts or ()
        end = self.start + self.num_tokens - len(drafts)
        return [*self.sequence.token_ids[self.start : end], *drafts]

    @property
    def is_missing_token(self) -> bool:
        """Whether the step before has yet to sample the newest token, or has not sampled it."""
        return self.awaits and len(self.sequence.token_ids) < self.start + self.num_tokens

    @property
    def without_drafts(self) -> ScheduledSequence:
        """The same step without drafts."""
        num_tokens = self.num_tokens - len(self.drafts or ())
        return msgspec.structs.replace(self, num_tokens=num_tokens, drafts=None)


class EngineSequences:
    """All sequences that an engine knows, by id. ``grammars`` computes the masks of those with a grammar.

    An unknown sequence has no tokens. It fails like one whose plan asks for more tokens than it has.
    """

    def __init__(self, grammars: GrammarMasks) -> None:
        self._sequences: dict[SequenceId, EngineSequence] = {}
        self._grammars = grammars
        self._with_grammar: set[SequenceId] = set()
        self._with_prompt_logprobs: set[SequenceId] = set()

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def want_prompt_logprobs(self) -> bool:
        """Whether any sequence wants log probabilities of its prompt."""
        return bool(self._with_prompt_logprobs)

    def apply(self, plan: StepPlan) -> list[ScheduledSequence]:
        """Apply the sequence changes of ``plan`` and return its batch. Call once per plan."""
        for id in plan.left:
            self._sequences.pop(id, None)
            self._with_grammar.discard(id)
            self._with_prompt_logprobs.discard(id)
        for new in plan.new:
            sequence = self._sequences[new.id] = EngineSequence(new)
            sequence.constraint = self._grammars.constraint(new.sampling)
            if new.sampling.grammar is not None:
                self._with_grammar.add(new.id)
            if new.sampling.num_prompt_logprobs is not None:
                self._with_prompt_logprobs.add(new.id)
        for change in plan.changed:
            self._find(change.id).change(change)
        return [
            ScheduledSequence(
                self._find(item.id),
                item.start,
                item.num_tokens,
                item.samples,
                item.writes_from,
                item.drafts,
                item.awaits,
            )
            for item in plan.batch
        ]

    def begin_masks(self, items: Iterable[ScheduledSequence]) -> Future[None] | None:
        """Begin to compute what grammars allow ``items`` to sample, those apart whose newest token is unknown.

        Returns when it is done; None if there is nothing to do.
        """
        if not self._with_grammar:
            return None
        wanted = [
            Wanted(constraint, _untold(item.sequence, constraint), item.drafts or ())
            for item in items
            if item.samples
            and isinstance(constraint := item.sequence.constraint, GrammarConstraint)
            and not item.is_missing_token
        ]
        return self._grammars.begin(wanted) if wanted else None

    def _find(self, id: SequenceId) -> EngineSequence:
        return self._sequences.get(id) or EngineSequence(NOBODY)

    def result(self, plan: StepPlan, items: Seq[ScheduledSequence], outcomes: Seq[SequenceOutcome]) -> StepResult:
        """Append what was sampled; return the result of ``plan``, whose batch is ``items``."""
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, SampledTokens):
                item.sequence.token_ids += outcome.token_ids
        ids = [item.id for item in plan.batch]
        return StepResult(step=plan.step, outcomes=dict(zip(ids, outcomes, strict=True)))


def _untold(sequence: EngineSequence, constraint: GrammarConstraint) -> list[int]:
    return sequence.token_ids[sequence.num_prompt_tokens + constraint.num_told :]
