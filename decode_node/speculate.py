"""Drafts: tokens proposed after the newest one, to be verified in one step (see ``ScheduledTokens.drafts``)."""

from __future__ import annotations

from typing import Protocol

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


class NgramIndex:
    """Where each run of ``shortest`` to ``longest`` tokens of a growing sequence ended last; indexes a token once."""

    __slots__ = ("_ends", "_num_indexed", "_sizes")

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def find(self, token_ids: list[int]) -> int | None:
        """Return the position after an earlier occurrence of the longest indexed run that ends ``token_ids``, or None.

        Indexes all tokens but the newest, so that the newest run finds an earlier one and not itself.
        """
        for end in range(self._num_indexed + 1, len(token_ids)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)
        runs = (tuple(token_ids[-size:]) for size in self._sizes if size <= len(token_ids))
        return next((self._ends[run] for run in runs if run in self._ends), None)


def proposer(config: SpeculativeConfig) -> Proposer:
    """Return the proposer that ``config`` names."""
    match config.method:
        case "none":
            return NoProposer()
        case "naive":
            return NaiveProposer()
        case "ngram":
            return NgramProposer(config)
