"""One step: what a scheduler asks of an engine, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from kvrelay.core.errors import EngineError
from kvrelay.core.request import Sequence, TokenLogprobs


class ScheduledSequence(NamedTuple):
    """Compute ``num_tokens`` tokens of ``sequence`` from position ``start`` on; its block table covers them already.

    KV of positions before ``sequence.num_computed_tokens`` is there and is not written again: a prompt that is
    wholly cached computes its last token only for the logits.

    ``samples``: the newest token is among them, so an output token is sampled after it.

    ``drafts``: guesses for the tokens after the newest one, computed with it and counted in ``num_tokens``. As many are
    accepted as equal what is sampled in their place, so the outputs are those of a step without guesses; one more is
    sampled after the last accepted. None: a plain step. The KV of guesses that are not accepted means nothing.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    drafts: tuple[int, ...] | None = None

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        drafts = self.drafts or ()
        end = self.start + self.num_tokens - len(drafts)
        return [*self.sequence.token_ids[self.start : end], *drafts]

    @property
    def without_drafts(self) -> ScheduledSequence:
        """The plain step in its place."""
        return self._replace(num_tokens=self.num_tokens - len(self.drafts or ()), drafts=None)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The batch of one step. Order is the order of results and of nothing else."""

    step: int
    batch: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        """Tokens this step computes."""
        return sum(scheduled.num_tokens for scheduled in self.batch)


class SampledTokens(NamedTuple):
    """Output tokens of one sequence in one step: none if it does not sample, several if drafts were accepted.

    ``logprobs`` has one entry for each token if the sequence asked for them, else none.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs]


class SequenceFailed(NamedTuple):
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


@dataclass(frozen=True, slots=True)
class StepResult:
    """``outcomes[i]`` belongs to ``plan.batch[i]``."""

    step: int
    outcomes: list[SequenceOutcome]

    @property
    def sampled(self) -> list[SampledTokens]:
        """The tokens of every sequence, for whoever runs an engine by hand. Raises EngineError if a sequence failed."""
        return [_tokens_of(outcome) for outcome in self.outcomes]


def _tokens_of(outcome: SequenceOutcome) -> SampledTokens:
    if isinstance(outcome, SequenceFailed):
        raise outcome.error
    return outcome
