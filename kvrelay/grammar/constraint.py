"""What one sequence in an engine may have next: by its grammar, by the tokens that it may have at all, or by both."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.errors import EngineError
from kvrelay.protocol.request import Grammar, SamplingParams
from kvrelay.protocol.token_rules import TokenRules

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


class AllowedTokens:
    """The tokens that a sequence without a grammar may have, the same at each place: a ``protocol.request.Constraint``.

    ``mask``: see ``protocol.token_rules``.
    """

    def __init__(self, mask: bytes, vocab_size: int) -> None:
        self._words: Words = np.frombuffer(mask, "<i4")
        self._vocab_size = vocab_size

    def words(self, num_output_tokens: int) -> Words:
        return self._words

    def allowed(self, num_output_tokens: int) -> Bools:
        return _bools(self._words, self._vocab_size)


class GrammarConstraint:
    """What the grammar in ``sampling`` allows after the output tokens so far: see ``protocol.request.Constraint``.

    If ``sampling`` names the tokens that are allowed, no others are.

    ``num_told``: output tokens that the thread of ``GrammarMasks`` knows or is being told. That thread sets
    ``matcher``, which has consumed them, the masks and ``failure``; who reads masks waits for ``computed`` first.
    """

    def __init__(self, sampling: SamplingParams, vocab_size: int) -> None:
        assert sampling.grammar is not None
        self.grammar: Grammar = sampling.grammar
        self.num_told = 0
        self.computed: Future[None] | None = None
        self.matcher: LLMatcher | None = None
        self.failure: str | None = None
        self._masks: Words | None = None
        self._vocab_size = vocab_size
        self._eos = _places(sampling.eos_token_ids)
        self._ends = _places([*sampling.eos_token_ids, *sampling.stop_token_ids])
        self._allowed = _allowed_words(sampling.token_rules)

    def take(self, masks: Words, end: int) -> None:
        """Take in the masks of the places from the newest token on [places, words].

        The tokens that end the request are allowed where the text may end, which bit ``end`` says; EOS nowhere else.
        """
        for mask in masks:
            may_end = mask[end // 32] & _bit(end)
            for word, bit in self._eos:
                mask[word] &= ~bit
            for word, bit in self._ends if may_end else ():
                mask[word] |= bit
        if self._allowed is not None:
            masks &= self._allowed
        self._masks = masks

    def words(self, num_output_tokens: int) -> Words:
        """Return the mask of the token after so many: a bit per token, int32 [words].

        After drafts that the grammar does not allow no token is. Raises EngineError if the grammar has failed.
        """
        if self.computed is None:
            raise EngineError("no masks were computed for a sequence with a grammar")
        self.computed.result()
        if self.failure is not None or self._masks is None:
            raise EngineError(f"the grammar cannot go on: {self.failure}")
        mask: Words = self._masks[num_output_tokens - self.num_told]
        return mask

    def allowed(self, num_output_tokens: int) -> Bools:
        return _bools(self.words(num_output_tokens), self._vocab_size)


class Wanted(NamedTuple):
    """Masks for the token after the newest and after each of ``drafts``.

    ``output``: the output tokens that the thread has not been told yet.
    """

    constraint: GrammarConstraint
    output: Sequence[int]
    drafts: Sequence[int]


def allowed_mask(rules: TokenRules | None) -> bytes | None:
    """Return the mask of the tokens that are allowed at all, None if all are."""
    return None if rules is None else rules.allowed


def _allowed_words(rules: TokenRules | None) -> Words | None:
    mask = allowed_mask(rules)
    return None if mask is None else np.frombuffer(mask, "<i4")


def _bools(words: Words, vocab_size: int) -> Bools:
    return np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size).view(np.bool_)


def _places(token_ids: list[int]) -> list[tuple[int, np.int32]]:
    """Return the word and the bit of each token in a mask."""
    return [(token_id // 32, _bit(token_id)) for token_id in token_ids]


def _bit(token_id: int) -> np.int32:
    return np.uint32(1 << token_id % 32).view(np.int32)
