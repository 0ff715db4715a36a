"""What a step means for each of its sequences, from what was sampled and what is not finite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import islice

from kvrelay.engine.device.batch import Batch
from kvrelay.engine.device.operations import NONE_LEFT
from kvrelay.engine.device.sequence_rows import Int32
from kvrelay.engine.sampler import none_left
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome
from kvrelay.protocol.request import TokenLogprobs


def outcomes_of(
    batch: Batch, tokens: Int32, entries: Iterator[TokenLogprobs | None] | None, broken: Int32 | None
) -> list[SequenceOutcome]:
    """Return the outcome of each of the batch's items.

    ``tokens`` and ``entries`` (None: there are none) are those of its samples; ``broken`` [rows] is 1 where a row is
    not finite, None if every row samples. A sequence with such a row fails, whether or not its logits show it (see
    ``paddle_engine``).
    """
    if broken is None and entries is None and len(tokens) == len(batch.items) and (tokens >= 0).all():
        return [SampledTokens([token], []) for token in tokens.tolist()]
    rows = iter(tokens.tolist())
    entries = itertools.repeat(None) if entries is None else entries
    outcomes: list[SequenceOutcome] = []
    for item, first_row in zip(batch.items, batch.first_rows, strict=True):
        count = 1 + len(item.drafts or ()) if item.samples else 0
        outcome = _sampled(item, list(islice(rows, count)), list(islice(entries, count)))
        if broken is not None and isinstance(outcome, SampledTokens):
            own = broken[first_row : first_row + item.num_tokens - len(item.drafts or ())]
            if own.any():
                position = item.start + int(own.argmax())
                outcome = SequenceFailed(f"the model's hidden states are not finite at position {position}")
        outcomes.append(outcome)
    return outcomes


def _sampled(item: ScheduledSequence, tokens: list[int], entries: list[TokenLogprobs | None]) -> SequenceOutcome:
    """Return the output tokens of ``item``: of drafts as many as were guessed right, and the one after.

    An error after accepted guesses is left to the next step, as in ``sampler.verify``.
    """
    if not tokens:
        return SampledTokens([], [])
    if tokens[0] < 0:
        return _failure(tokens[0], item.sequence.num_output_tokens)
    drafts = item.drafts or ()
    end = next((index + 1 for index, draft in enumerate(drafts) if tokens[index] != draft), len(tokens))
    end = next((index for index, token in enumerate(tokens[:end]) if token < 0), end)
    return SampledTokens(tokens[:end], [entry for entry in entries[:end] if entry is not None])


def _failure(code: int, position: int) -> SequenceFailed:
    if code == NONE_LEFT:
        return none_left(position)
    return SequenceFailed(f"the model's logits are not finite at output position {position}")
