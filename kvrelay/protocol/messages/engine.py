"""Machine -> engine: plans of steps. Engine -> machine: results of steps.

The engine keeps its own copy of each sequence that it computes and appends the tokens it samples. The machine appends
the same tokens to its own copy when the result arrives. A plan therefore contains only what the engine cannot know.
Plans are computed in the order in which they are submitted.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvrelay.errors import EngineError, InvalidRequestError
from kvrelay.protocol.ids import BlockId, RequestId, SequenceId
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.request import PromptLogprobs, SamplingParams, TokenLogprobs


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that is new to the engine: all its tokens, prompt first, and its blocks.

    ``request_id`` is for logs only.
    """

    id: SequenceId
    request_id: RequestId
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_table: list[BlockId]


class SequenceChange(msgspec.Struct, frozen=True, array_like=True):
    """Changes of a sequence since the last plan that contained it, except for tokens that the engine sampled.

    First ``replaced``, a list of (index in the block table, block), replaces blocks by others with the same KV. Then
    ``block_ids`` are appended to the block table and ``token_ids`` to the tokens.
    """

    id: SequenceId
    block_ids: list[BlockId] = []
    replaced: list[tuple[int, BlockId]] = []
    token_ids: list[int] = []


class ScheduledTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Compute ``num_tokens`` tokens of sequence ``id`` from position ``start`` on; its block table covers them.

    ``samples``: the newest token is among them, so an output token is sampled after it.

    The KV of positions before ``writes_from`` exists and is not written again. A prompt that is completely cached
    computes its last token for the logits only.

    ``drafts``: proposed tokens after the newest one, computed with it and counted in ``num_tokens``. A draft is
    accepted if it equals the token sampled at its position and all drafts before it are accepted. One more token is
    sampled after the last accepted draft, so the output is that of steps without drafts. None: no speculation. The KV
    of rejected drafts is invalid.

    ``awaits``: the newest token was unknown when this was planned. It is the token that the previous step samples for
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
    """Machine -> engine, for each step.

    The reader drops the sequences in ``left``, adds ``new``, applies ``changed`` and computes ``batch``, which contains
    each sequence at most once. A sequence leaves when it has ended, was preempted or was handed off; ``left`` names it
    in the next plan. Answered by a StepResult, or by the event StepFailed if no sequence has an outcome.
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

    ``logprobs`` has one entry per token if the request asked for them, else it is empty. ``prompt_logprobs``, in
    pieces, are those of the prompt tokens that follow the tokens computed, if the request asked for them.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


class SequenceFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """One sequence of a step has failed. The results of the other sequences are as they would be without it.

    The KV that the step computed for it is undefined and must not be published. ``retryable``: the request may succeed
    on another node or in a later attempt. ``invalid``: the cause is what the request asks for.
    """

    reason: str
    retryable: bool = False
    invalid: bool = False

    @property
    def error(self) -> EngineError | InvalidRequestError:
        """The error that ends the request."""
        if self.invalid:
            return InvalidRequestError(self.reason)
        return EngineError(self.reason, retryable=self.retryable)


SequenceOutcome: TypeAlias = SampledTokens | SequenceFailed


class StepResult(Message, frozen=True, kw_only=True):
    """Engine -> machine, after each step: the outcome of each sequence, in the order of the batch.

    The reader appends the tokens and ends the requests that failed.
    """

    step: int
    outcomes: dict[SequenceId, SequenceOutcome]

    @property
    def sampled(self) -> list[SampledTokens]:
        """The outcomes of all sequences. Raises EngineError if one has failed. For tests and benchmarks."""
        return [_tokens_of(outcome) for outcome in self.outcomes.values()]


def _tokens_of(outcome: SequenceOutcome) -> SampledTokens:
    if isinstance(outcome, SequenceFailed):
        raise outcome.error
    return outcome
