"""Computes masks with the library."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from llguidance import LLExecutor, LLMatcher

from kvrelay.grammar.compiler import CompiledGrammars, GrammarError, check
from kvrelay.grammar.constraint import Wanted, Words
from kvrelay.grammar.vocabulary import Vocabulary
from kvrelay.protocol.token_rules import mask_words

_MOST_THREADS = 8


class MaskWriter:
    """Advances matchers and writes masks, for one thread. The library computes in its own threads, without the GIL."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._compiled = CompiledGrammars(vocabulary)
        self._library = LLExecutor(min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 4)))

    @classmethod
    def open(cls, vocab_size: int, model_dir: Path | None) -> Self:
        """Read the tokenizer in ``model_dir``. Raises CheckpointError."""
        if model_dir is None:
            return cls(Vocabulary.plain(vocab_size))
        return cls(Vocabulary.load(model_dir, vocab_size))

    def write(self, wanted: Sequence[Wanted]) -> None:
        """Tell each matcher its new tokens, then write all masks. A grammar that fails fails alone."""
        ready = [(item, matcher) for item in wanted if (matcher := self._advanced(item)) is not None]
        counts = [1 + len(item.drafts) for item, _ in ready]
        masks: Words = np.zeros((sum(counts), mask_words(self._vocabulary.size)), np.int32)
        firsts = (np.cumsum(counts) - counts).tolist()
        self._fill(ready, firsts, masks)
        for (item, matcher), first, count in zip(ready, firsts, counts, strict=True):
            try:
                check(matcher)
            except GrammarError as error:
                item.constraint.failure = str(error)
            else:
                item.constraint.take(masks[first : first + count], self._vocabulary.end)

    def _advanced(self, item: Wanted) -> LLMatcher | None:
        """Return the matcher of ``item`` after its new tokens, None if it has failed."""
        constraint = item.constraint
        try:
            if constraint.matcher is None:
                constraint.matcher = self._compiled.matcher(constraint.grammar)
            if item.output:
                constraint.matcher.consume_tokens(list(item.output))
            check(constraint.matcher)
        except GrammarError as error:
            constraint.failure = str(error)
            return None
        return constraint.matcher

    def _fill(self, ready: Sequence[tuple[Wanted, LLMatcher]], firsts: Sequence[int], masks: Words) -> None:
        """Write the masks of each of ``ready`` to ``masks`` from its row in ``firsts`` on."""
        plain = [(matcher, first) for (item, matcher), first in zip(ready, firsts, strict=True) if not item.drafts]
        drafted = [
            (matcher, first, list(item.drafts))
            for (item, matcher), first in zip(ready, firsts, strict=True)
            if item.drafts
        ]
        room = (masks.ctypes.data, masks.shape[1] * masks.itemsize, len(masks))
        if plain:
            self._library.unsafe_compute_mask_ptr(plain, *room)
        if drafted:  # the library takes no empty list of drafts
            self._library.unsafe_compute_mask_ptr_with_draft_token(drafted, *room)
