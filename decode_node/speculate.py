"""Drafts: tokens proposed after the newest one, to be verified in one step (see ``ScheduledTokens.drafts``)."""

from __future__ import annotations

from typing import Protocol

from decode_node.ngram_index import NgramIndex
from decode_node.request import DecodeRequest
from kvrelay.config.cluster_config import SpeculativeConfig


class Proposer(Protocol):
    """Called by the scheduler for each decode of each step."""

    def propose(self, request: DecodeRequest, limit: int) -> tuple[int, ...] | None:
        """Return at most ``limit`` drafts for the tokens after the newest of ``request``; None: a plain step."""


class NoProposer:
    """Plain steps."""

    def propose(self, request: DecodeRequest, limit: int) -> None:
        """Return None."""
        return


class NaiveProposer:
    """The speculative path without drafts: shows that the path changes no token."""

    def propose(self, request: DecodeRequest, limit: int) -> tuple[int, ...]:
        """Return no drafts."""
        return ()


class NgramProposer:
    """Prompt lookup: what followed the last time the newest few tokens stood together, in prompt or output.

    The longest run of up to ``ngram_max`` tokens that occurred before wins, down to ``ngram_min``.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config

    def propose(self, request: DecodeRequest, limit: int) -> tuple[int, ...]:
        """Return what followed, if the newest tokens occurred before."""
        if request.ngrams is None:
            request.ngrams = NgramIndex(self._config.ngram_min, self._config.ngram_max)
        position = request.ngrams.find(request.token_ids)
        num_drafts = min(limit, self._config.num_speculative_tokens)
        return () if position is None else tuple(request.token_ids[position : position + num_drafts])


def proposer(config: SpeculativeConfig) -> Proposer:
    """Return the proposer that ``config`` names."""
    match config.method:
        case "none":
            return NoProposer()
        case "naive":
            return NaiveProposer()
        case "ngram":
            return NgramProposer(config)
