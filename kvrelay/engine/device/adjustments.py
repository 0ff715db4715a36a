"""Changes of logits before a token is drawn, as lists of tokens: bias, penalties and tokens that may not come yet."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.errors import EngineError
from kvrelay.protocol.request import SamplingParams

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

_LEAST_PENALTY = float(np.finfo(np.float32).tiny)


def adjusts(sampling: SamplingParams) -> bool:
    """Return whether a sequence's logits may be changed before a token is drawn."""
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.min_tokens
        or (sampling.token_rules is not None and sampling.token_rules.bad_words is not None)
    )


def needs_tokens(sampling: SamplingParams) -> bool:
    """Return whether the choice of a token depends on what the tokens so far are, not only on how many."""
    bad_words = None if sampling.token_rules is None else sampling.token_rules.bad_words
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.grammar is not None
        or (bad_words is not None and bad_words.after)
    )


def row_adjustments(item: ScheduledSequence, ahead: int, vocab_size: int) -> tuple[Int32, Float32]:
    """Return tokens int32 [n], no two alike, and for each a bias, a repetition penalty and what to subtract [3, n].

    They are those of the item's sequence with the first ``ahead`` of its drafts appended; see ``sampler.sample``. The
    newest token may be missing if they do not depend on it (``needs_tokens``).
    Raises EngineError if one is not in the vocabulary.
    """
    sequence = item.sequence
    params, drafts = sequence.sampling, list((item.drafts or ())[:ahead])
    known = [*sequence.token_ids, *drafts]
    token_ids = np.array(known, np.int32)
    output, counts = np.unique(token_ids[sequence.num_prompt_tokens :], return_counts=True)
    penalized = params.presence_penalty or params.frequency_penalty
    num_tokens = item.start + item.num_tokens - len(item.drafts or ()) + ahead
    too_early = num_tokens - sequence.num_prompt_tokens < params.min_tokens
    banned = [*params.eos_token_ids, *params.stop_token_ids] if too_early else []
    if params.token_rules is not None and params.token_rules.bad_words is not None:
        banned += params.token_rules.bad_words.next(known[sequence.num_prompt_tokens :])
    seen = np.unique(token_ids) if params.repetition_penalty != 1.0 else token_ids[:0]
    touched = [list(params.logit_bias), seen, output if penalized else output[:0], banned]
    tokens = np.unique(np.concatenate([np.asarray(part, np.int32) for part in touched]))
    if tokens.size and (tokens[0] < 0 or tokens[-1] >= vocab_size):
        raise EngineError(f"token ids leave the vocabulary of {vocab_size}")  # which ones no log may have
    changes = np.zeros((3, len(tokens)), np.float32)
    changes[0, np.searchsorted(tokens, list(params.logit_bias))] = list(params.logit_bias.values())
    changes[1] = 1.0
    changes[1, np.searchsorted(tokens, seen)] = max(params.repetition_penalty, _LEAST_PENALTY)
    if penalized:
        changes[2, np.searchsorted(tokens, output)] = params.presence_penalty + params.frequency_penalty * counts
    changes[2, np.searchsorted(tokens, banned)] = np.inf
    return tokens, changes
