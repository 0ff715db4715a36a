"""A node's machine -> its engine: plans of steps. Its engine -> the machine: their results.

The engine has its own copy of each sequence that it computes. It appends the tokens it samples to that copy, and the
machine appends the same tokens to its own when the result comes in, so a plan says only what the engine cannot know.
Plans are computed one after the other, in the order in which they are submitted.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvrelay.errors import EngineError
from kvrelay.protocol.ids import BlockId, SequenceId
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.request import SamplingParams, TokenLogprobs


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that the engine does not know: all its tokens, prompt first, and the blocks for them.

    ``request_id`` is for logs only.
    """

    id: SequenceId
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_table: list[BlockId]


class SequenceChange(msgspec.Struct, frozen=True, array_like=True):
    """What has changed in a sequence since the last plan that had it, apart from the tokens the engine sampled.

    ``block_ids`` are appended to its block table. Before that ``replaced`` [(place in the table, block)] take the place
    of others: they hold the same KV. ``token_ids`` are appended to its tokens.
    """

    id: SequenceId
    block_ids: list[BlockId] = []
    replaced: list[tuple[int, BlockId]] = []
    token_ids: list[int] = []


class ScheduledTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Compute ``num_tokens`` tokens of sequence ``id`` from position ``start`` on; its blocks cover them.

    ``samples``: the newest token is among them, so an output token is sampled after it.

    The KV of positions before ``writes_from`` is there and is not written again: a prompt that is wholly cached
    computes its last token for the logits only.

    ``drafts``: guesses for the tokens after the newest one, computed with it and counted in ``num_tokens``. As many are
    accepted as equal what is sampled in their place, so the outputs are those of a step without guesses; one more is
    sampled after the last accepted. None: a plain step. The KV of guesses that are not accepted means nothing.

    ``awaits``: the newest token was not known when this was planned. It is the one that the step before samples for
    this sequence.
    """

    id: SequenceId
    start: int
    num_tokens: int
    samples: bool
    writes_from: int
    drafts: tuple[int, ...] | None = None
    awaits: bool = False


class StepPlan(Message, frozen=True, kw_only=True):
    """A node's machine -> its engine, for each step.

    The reader forgets the sequences in ``left``, takes in ``new`` and ``changed`` ones, and computes ``batch``, in
    which each sequence occurs once. Sequences leave when they have ended, were preempted or went to another node; the
    reader hears of it with the next plan. Answered by a StepResult.
    """

    step: int
    batch: list[ScheduledTokens]
    new: list[NewSequence] = msgspec.field(default_factory=list)
    changed: list[SequenceChange] = msgspec.field(default_factory=list)
    left: list[SequenceId] = msgspec.field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens this step computes."""
        return sum(scheduled.num_tokens for scheduled in self.batch)


class SampledTokens(msgspec.Struct, frozen=True, array_like=True, tag="sampled"):
    """Output tokens of one sequence in one step: none if it does not sample, several if drafts were accepted.

    ``logprobs`` has one entry for each token if the sequence asked for them, else none.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs]


class SequenceFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """Why one sequence of a step cannot go on. The other sequences of the step are as they would be without it.

    The KV of the tokens that the step computed of it is undefined: it must never be published. ``retryable``: another
    node, or a later try, may succeed.
    """

    reason: str
    retryable: bool = False

    @property
    def error(self) -> EngineError:
        """The error that ends the request."""
        return EngineError(self.reason, retryable=self.retryable)


SequenceOutcome: TypeAlias = SampledTokens | SequenceFailed


class StepResult(Message, frozen=True, kw_only=True):
    """An engine -> its node's machine, after each step: what came of each sequence of the batch, in its order.

    The reader appends the tokens, and ends the requests that failed.
    """

    step: int
    outcomes: dict[SequenceId, SequenceOutcome]

    @property
    def sampled(self) -> list[SampledTokens]:
        """The tokens of every sequence, for whoever runs an engine by hand. Raises EngineError if a sequence failed."""
        return [_tokens_of(outcome) for outcome in self.outcomes.values()]


def _tokens_of(outcome: SequenceOutcome) -> SampledTokens:
    if isinstance(outcome, SequenceFailed):
        raise outcome.error
    return outcome
