"""The grammar of one sequence in an engine."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.errors import EngineError
from kvrelay.protocol.request import Grammar, SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


def mask_words(vocab_size: int) -> int:
    """Return the words of a mask: a bit for each token and one for the end of the text, in 32-bit integers."""
    return vocab_size // 32 + 1


class GrammarConstraint:
    """What the grammar in ``sampling`` allows after the output tokens so far: see ``protocol.request.Constraint``.

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
        bits = np.unpackbits(self.words(num_output_tokens).view(np.uint8), bitorder="little", count=self._vocab_size)
        return bits.view(np.bool_)


class Wanted(NamedTuple):
    """Masks for the token after the newest and after each of ``drafts``.

    ``output``: the output tokens that the thread has not been told yet.
    """

    constraint: GrammarConstraint
    output: Sequence[int]
    drafts: Sequence[int]


def _places(token_ids: list[int]) -> list[tuple[int, np.int32]]:
    """Return the word and the bit of each token in a mask."""
    return [(token_id // 32, _bit(token_id)) for token_id in token_ids]


def _bit(token_id: int) -> np.int32:
    return np.uint32(1 << token_id % 32).view(np.int32)
