"""Log probabilities of prompt tokens: which rows of a step give them, and what they are, in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.engine.sampler import Float32, token_logprobs
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.errors import EngineError
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome
from kvrelay.protocol.request import PromptLogprobs, TokenLogprobs

Int64 = npt.NDArray[np.int64]

MAX_LOGITS = 1 << 23
"""Logits that are computed at once for prompt tokens on a CPU, at most, but of one token at least: 32 MiB."""

MAX_ENTRIES = 4096
"""Log probabilities in one piece, at most, but of one token at least: 48 KiB in a message, some ms of a router."""


class PromptRows(NamedTuple):
    """Rows of a step after which prompt tokens come: those from position ``start`` on are ``targets``.

    ``place``: that of the sequence among the batch's items.
    """

    place: int
    rows: Int64
    targets: list[int]
    start: int
    num_alternatives: int

    def pieces(self, vocab_size: int, max_logits: int) -> Iterator[PromptRows]:
        """Yield the rows in pieces of at most ``max_logits`` logits and ``MAX_ENTRIES`` log probabilities."""
        size = max(1, min(max_logits // vocab_size, MAX_ENTRIES // (1 + self.num_alternatives)))
        for first in range(0, len(self.targets), size):
            piece = slice(first, first + size)
            yield self._replace(rows=self.rows[piece], targets=self.targets[piece], start=self.start + first)


def prompt_rows(items: Sequence[ScheduledSequence], first_rows: Sequence[int], vocab_size: int) -> list[PromptRows]:
    """Return the rows of ``items`` whose log probabilities are wanted. ``first_rows[i]`` is the first one of item i."""
    found: list[PromptRows] = []
    for place, (item, first_row) in enumerate(zip(items, first_rows, strict=True)):
        sequence, start = item.sequence, item.start
        wanted = sequence.sampling.num_prompt_logprobs
        count = min(start + item.num_tokens, sequence.num_prompt_tokens - 1) - start
        if wanted is not None and count > 0:
            targets = sequence.token_ids[start + 1 : start + 1 + count]
            rows = np.arange(first_row, first_row + count)
            found.append(PromptRows(place, rows, targets, start + 1, min(wanted, vocab_size)))
    return found


def add_prompt_logprobs(
    outcomes: list[SequenceOutcome],
    wanted: Sequence[PromptRows],
    vocab_size: int,
    compute: Callable[[PromptRows], PromptLogprobs],
) -> None:
    """Add to the ``outcomes`` those of the ``wanted`` rows. ``compute`` gets pieces of them; EngineError: it fails."""
    for rows in wanted:
        outcome = outcomes[rows.place]
        if isinstance(outcome, SequenceFailed):
            continue
        try:
            pieces = tuple(compute(piece) for piece in rows.pieces(vocab_size, MAX_LOGITS))
        except EngineError as error:
            outcomes[rows.place] = SequenceFailed(error.message, retryable=error.retryable)
        else:
            outcomes[rows.place] = SampledTokens(outcome.token_ids, outcome.logprobs, pieces)


def logprobs_of(logits: Float32, rows: PromptRows) -> PromptLogprobs:
    """Return the log probabilities of ``rows`` from their ``logits`` [len(rows.targets), vocab_size].

    They are those that ``sampler`` gives for the same tokens as output. Raises EngineError if logits are NaN or plus
    infinity.
    """
    entries: list[TokenLogprobs] = []
    ranks: list[int] = []
    for row, target in zip(logits, rows.targets, strict=True):
        if not np.isfinite(row.max()):
            raise EngineError(f"the model's logits are not finite at prompt position {rows.start + len(entries)}")
        entries.append(token_logprobs(row, target, rows.num_alternatives))
        ranks.append(int(np.count_nonzero(row >= row[target])))
    return packed(rows, ranks, entries)


def packed(rows: PromptRows, ranks: Sequence[int], entries: Sequence[TokenLogprobs]) -> PromptLogprobs:
    """Return ``ranks`` and ``entries`` of ``rows`` as they travel."""
    token_ids = [
        id for target, entry in zip(rows.targets, entries, strict=True) for id in (target, *entry.top_token_ids)
    ]
    logprobs = [value for entry in entries for value in (entry.logprob, *entry.top_logprobs)]
    return PromptLogprobs(
        rows.start,
        rows.num_alternatives,
        np.array(ranks, "<i4").tobytes(),
        np.array(token_ids, "<i4").tobytes(),
        np.array(logprobs, "<f8").tobytes(),
    )
