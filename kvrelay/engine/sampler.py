"""Samples output tokens from logits, on the host.

The order and meaning of the operations are vLLM's: logit_bias, penalties, min_tokens, bad words, grammar and allowed
tokens; then greedy, or temperature, min_p, top_k, top_p and a draw. Log probabilities are those of the model, before
any of these operations.

The draw inverts the distribution function in vocabulary order with one uniform number that is a hash of the request's
seed and the token's position. So a token depends on nothing but its context and seed, and a logit that differs in its
last bits moves a boundary by as little, instead of exchanging neighbours in a sorted order.

What cannot be sampled is the error of its sequence: logits that are NaN or plus infinity (one of minus infinity is a
token that is never sampled), parameters that leave no token, and whatever else sampling raises.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence as Seq
from copy import copy

import numpy as np
import numpy.typing as npt
import xxhash

from kvrelay.engine.highest_allowed import highest_allowed
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.errors import EngineError
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome
from kvrelay.protocol.request import Constraint, SamplingParams, TokenLogprobs, TokenSequence

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing by it would overflow."""

_SEED_MASK = (1 << 64) - 1
_FLOAT32 = np.finfo(np.float32)


def sample_step(logits: Float32 | None, batch: Seq[ScheduledSequence]) -> list[SequenceOutcome]:
    """Return the outcome of each of ``batch``: its output tokens, none if it does not sample, or its error.

    ``logits`` [rows, vocab_size] has, in order of the batch, a row for each one that samples, or one more than it has
    drafts; None if no sequence samples.
    """
    if logits is None:
        return [SampledTokens([], []) for _ in batch]
    if all(item.drafts is None for item in batch):
        plain = iter(sample(logits, [item.sequence for item in batch if item.samples]))
        return [next(plain) if item.samples else SampledTokens([], []) for item in batch]
    sampled: list[SequenceOutcome] = []
    row = 0
    for item in batch:
        num_rows = 1 + len(item.drafts or ()) if item.samples else 0
        rows, row = logits[row : row + num_rows], row + num_rows
        sampled.append(verify(rows, item.sequence, item.drafts or ()) if item.samples else SampledTokens([], []))
    return sampled


def verify(logits: Float32, sequence: TokenSequence, drafts: Seq[int]) -> SequenceOutcome:
    """Return the tokens that sampling one by one would give, up to and including the first that is not in ``drafts``.

    ``logits`` [1 + len(drafts), vocab_size]: after the newest token and after each draft. A guess is accepted if it is
    what its place samples anyway. That happens with the probability the model gives the guess, as in rejection sampling
    of a proposal that is certain of itself; and because random numbers are keyed by position, the very same
    tokens come out as without guesses. So does an error: after accepted guesses it is left to the next step, which
    begins in that place, unless one of the accepted ends the request.
    """
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for row, draft in zip(logits, (*drafts, None), strict=True):
        outcome = sample(row[None], [ahead(sequence, token_ids)])[0]
        if isinstance(outcome, SequenceFailed):
            return SampledTokens(token_ids, logprobs) if token_ids else outcome
        token_ids += outcome.token_ids
        logprobs += outcome.logprobs
        if outcome.token_ids[0] != draft:
            break
    return SampledTokens(token_ids, logprobs)


def ahead(sequence: TokenSequence, token_ids: list[int]) -> TokenSequence:
    """Return ``sequence`` with ``token_ids`` appended, or itself if there are none."""
    if not token_ids:
        return sequence
    ahead = copy(sequence)
    ahead.token_ids = [*sequence.token_ids, *token_ids]
    return ahead


def sample(logits: Float32, sequences: Seq[TokenSequence]) -> list[SequenceOutcome]:
    """Return one output token, or an error, for each row of ``logits`` [len(sequences), vocab_size]."""
    greedy = np.argmax(logits, axis=-1) if logits.size else ()
    return [
        _sample_row(row, int(token), sequence) for row, token, sequence in zip(logits, greedy, sequences, strict=True)
    ]


def none_left(position: int) -> SequenceFailed:
    """Return the outcome of a sequence of which every token is excluded at this output position."""
    reason = "the sampling parameters leave no token to choose"
    return SequenceFailed(f"output position {position} cannot be sampled: {reason}", invalid=True)


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) of the token at ``position`` of a sequence with ``seed``."""
    digest = xxhash.xxh3_64_intdigest(struct.pack("<QQ", seed & _SEED_MASK, position))
    return (digest >> 11) * 2.0**-53


def token_logprobs(row: Float32, token_id: int, num_logprobs: int) -> TokenLogprobs:
    """Return the log softmax of ``row`` at ``token_id`` and at its highest entries, lower ids first in ties."""
    highest = float(row.max())
    log_total = highest + float(np.log(np.exp(row - np.float32(highest)).sum(dtype=np.float64)))
    top = _highest(row, num_logprobs)
    return TokenLogprobs(float(row[token_id]) - log_total, top, [float(row[item]) - log_total for item in top])


def changes_logits(sequence: TokenSequence) -> bool:
    """Return whether the logits of this sequence's next token must be adjusted before temperature and filters."""
    params = sequence.sampling
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or sequence.num_output_tokens < params.min_tokens
        or (params.token_rules is not None and params.token_rules.bad_words is not None)
    )


def _constrained(
    row: Float32, token: int, sequence: TokenSequence, constraint: Constraint
) -> tuple[int | None, Float32]:
    """Return the highest token that ``constraint`` allows, or None, and ``row`` to draw from; its highest is ``token``.

    A greedy token that is allowed is the usual case, and needs no more than that bit.
    """
    if sequence.sampling.temperature >= GREEDY_BELOW:
        allowed = np.where(constraint.allowed(sequence.num_output_tokens), row, np.float32(-np.inf))
        return int(np.argmax(allowed)), allowed
    words = constraint.words(sequence.num_output_tokens)
    if words[token // 32] >> token % 32 & 1:
        return token, row
    return highest_allowed(row, words), row


def _sample_row(row: Float32, greedy: int, sequence: TokenSequence) -> SequenceOutcome:
    """Sample one sequence; ``greedy`` is where its raw logits are highest, or the first that is NaN."""
    if not math.isfinite(row[greedy]):
        return SequenceFailed(f"the model's logits are not finite at output position {sequence.num_output_tokens}")
    try:
        return _sample_finite(row, greedy, sequence)
    except Exception as error:  # the border of a sequence: what sampling it raises must not end the others of the step
        reason = error.message if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        return SequenceFailed(f"output position {sequence.num_output_tokens} cannot be sampled: {reason}")


def _sample_finite(row: Float32, greedy: int, sequence: TokenSequence) -> SequenceOutcome:
    params = sequence.sampling
    token, adjusted = greedy, row
    if changes_logits(sequence):
        adjusted = _adjust(row, sequence)
        token = int(np.argmax(adjusted))
    if sequence.constraint is not None:
        allowed, adjusted = _constrained(adjusted, token, sequence, sequence.constraint)
        if allowed is None:
            return none_left(sequence.num_output_tokens)
        token = allowed
    if not math.isfinite(adjusted[token]):
        return none_left(sequence.num_output_tokens)
    if params.temperature >= GREEDY_BELOW:
        token = _draw(_filtered(adjusted, params), uniform(params.seed, sequence.num_tokens))
    if params.num_logprobs is None:
        return SampledTokens([token], [])
    return SampledTokens([token], [token_logprobs(row, token, params.num_logprobs)])


def _adjust(row: Float32, sequence: TokenSequence) -> Float32:
    """Return a copy of ``row`` with logit_bias, penalties, min_tokens and bad words applied."""
    params, adjusted = sequence.sampling, row.copy()
    for token_id, bias in params.logit_bias.items():
        adjusted[token_id] += bias
    if params.repetition_penalty != 1.0:
        seen = np.unique(sequence.token_ids)
        adjusted[seen] = _penalized(adjusted[seen], params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output, counts = np.unique(sequence.token_ids[sequence.num_prompt_tokens :], return_counts=True)
        output = output.astype(np.intp)
        adjusted[output] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    if sequence.num_output_tokens < params.min_tokens:
        adjusted[[*params.eos_token_ids, *params.stop_token_ids]] = -np.inf
    if params.token_rules is not None and params.token_rules.bad_words is not None:
        adjusted[params.token_rules.bad_words.next(sequence.token_ids[sequence.num_prompt_tokens :])] = -np.inf
    return adjusted


def _penalized(values: Float32, penalty: float) -> Float32:
    """Return ``values`` after a repetition penalty. The quotient by a tiny one is at most the largest float32."""
    divisor = np.float32(max(penalty, float(_FLOAT32.tiny)))
    with np.errstate(over="ignore"):
        scaled = np.where(values > 0, values / divisor, values * divisor)
    return np.minimum(scaled, _FLOAT32.max)


def _filtered(row: Float32, params: SamplingParams) -> Float64:
    """Return unnormalised probabilities [vocab_size] after temperature, min_p, top_k and top_p."""
    scaled = row.astype(np.float64) / params.temperature
    weights: Float64 = np.exp(scaled - scaled.max())
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0  # the highest weight is 1
    if 0 < params.top_k < len(weights):
        weights[weights < np.partition(weights, -params.top_k)[-params.top_k]] = 0.0
    if params.top_p < 1.0:
        weights[weights < _top_p_threshold(weights, params.top_p)] = 0.0
    return weights


def _top_p_threshold(weights: Float64, top_p: float) -> float:
    """Return the lowest weight among the fewest highest ones whose sum reaches ``top_p`` of the total."""
    total = weights.sum()
    # all below this cutoff together are less than 1 - top_p of the total, so they need not be sorted
    candidates = np.sort(weights[weights >= (1.0 - top_p) * total / len(weights)])[::-1]
    last = int(np.searchsorted(np.cumsum(candidates), top_p * total))
    return float(candidates[min(last, len(candidates) - 1)])


def _draw(weights: Float64, random: float) -> int:
    """Return the token where the distribution function of ``weights`` passes ``random``, in vocabulary order."""
    cumulated = np.cumsum(weights)
    token = int(np.searchsorted(cumulated, random * cumulated[-1], side="right"))
    return min(token, int(np.flatnonzero(weights)[-1]))


def _highest(row: Float32, count: int) -> list[int]:
    """Return the indices of the ``count`` highest entries in falling order, lower indices first in ties."""
    if count == 0:
        return []
    if count == 1:
        return [int(row.argmax())]
    threshold = np.partition(row, -count)[-count] if count < len(row) else row.min()
    candidates = np.flatnonzero(row >= threshold)
    order: list[int] = candidates[np.argsort(-row[candidates], kind="stable")][:count].tolist()
    return order
