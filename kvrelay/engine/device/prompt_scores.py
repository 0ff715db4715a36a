"""Log probabilities of prompt tokens on the device: computed in pieces after a step, read when the step is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvrelay.engine.device.decoder import DeviceDecoder
from kvrelay.engine.device.framework import Tensor
from kvrelay.engine.device.step_slot import Results, StepSlot
from kvrelay.engine.prompt_logprobs import PromptRows
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome
from kvrelay.protocol.request import PromptLogprobs

MAX_LOGITS = 1 << 24
"""Logits that are computed at once for prompt tokens, at most, but of one token at least: 64 MiB."""


class ScoredPiece(NamedTuple):
    """Rows whose log probabilities are in ``results`` when the step is done."""

    rows: PromptRows
    results: Results

    def logprobs(self) -> PromptLogprobs | SequenceFailed:
        """Return them, or the failure of their sequence."""
        ranks, tops, logprobs, _ = self.results
        assert tops is not None and logprobs is not None
        if (ranks < 0).any():
            position = self.rows.start + int((ranks < 0).argmax())
            return SequenceFailed(f"the model's logits are not finite at prompt position {position}")
        width = 1 + self.rows.num_alternatives
        token_ids = tops[:, :width].astype("<i4")
        token_ids[:, 0] = self.rows.targets
        return PromptLogprobs(
            self.rows.start,
            self.rows.num_alternatives,
            ranks.astype("<i4").tobytes(),
            token_ids.tobytes(),
            logprobs[:, :width].astype("<f8").tobytes(),
        )


def score_prompts(
    wanted: Sequence[PromptRows],
    residual: Tensor,
    decoder: DeviceDecoder,
    slot: StepSlot,
    first: int,
    vocab_size: int,
) -> list[ScoredPiece]:
    """Have the log probabilities of the ``wanted`` rows computed from ``residual`` and copied to the host.

    They take the rows of ``slot`` from ``first`` on. A row of a step that samples is not among them, so there is room.
    """
    scored: list[ScoredPiece] = []
    for rows in wanted:
        for piece in rows.pieces(vocab_size, MAX_LOGITS):
            places = slot.arena.upload(np.asarray(piece.rows, np.int32))
            targets = slot.arena.upload(np.asarray(piece.targets, np.int32))
            found = decoder.prompt_logprobs(residual, places, targets, piece.num_alternatives)
            scored.append(ScoredPiece(piece, slot.fetch_prompt(found, first)))
            first += len(piece.targets)
    return scored


def add_scores(outcomes: list[SequenceOutcome], scored: Sequence[ScoredPiece]) -> None:
    """Add what was ``scored`` to the ``outcomes`` of the batch's items, once the device is done."""
    for piece in scored:
        outcome = outcomes[piece.rows.place]
        if isinstance(outcome, SampledTokens):
            found = piece.logprobs()
            if isinstance(found, SequenceFailed):
                outcomes[piece.rows.place] = found
            else:
                logprobs = (*outcome.prompt_logprobs, found)
                outcomes[piece.rows.place] = SampledTokens(outcome.token_ids, outcome.logprobs, logprobs)
