"""Computes masks of the sequences of a step in a thread, while the step's forward pass runs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvrelay.grammar.constraint import AllowedTokens, GrammarConstraint, Wanted, allowed_mask
from kvrelay.protocol.request import SamplingParams

if TYPE_CHECKING:
    from kvrelay.grammar.mask_writer import MaskWriter


class GrammarMasks:
    """The grammars of one engine. It is told tokens and computes masks in the order of the calls.

    ``model_dir``: the checkpoint, whose tokenizer the thread reads when ``open`` is called or the first grammar is
    there. None: the plain tokens of an engine without a model.
    """

    def __init__(self, vocab_size: int, model_dir: Path | None = None) -> None:
        self._vocab_size = vocab_size
        self._model_dir = model_dir
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._writer: MaskWriter | None = None

    def open(self) -> None:
        """Begin to read the tokenizer, so that no request waits for it. An error is that of the first request."""
        self._thread.submit(self._opened)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def constraint(self, sampling: SamplingParams) -> GrammarConstraint | AllowedTokens | None:
        """Return the constraint of a new sequence. None: it may have any token at any place."""
        if sampling.grammar is not None:
            return GrammarConstraint(sampling, self._vocab_size)
        mask = allowed_mask(sampling.token_rules)
        return None if mask is None else AllowedTokens(mask, self._vocab_size)

    def begin(self, wanted: Sequence[Wanted]) -> Future[None]:
        """Begin to compute masks; return when that is done. Each constraint may be in ``wanted`` once."""
        computed: Future[None] = self._thread.submit(partial(self._compute, wanted))
        for constraint, output, _ in wanted:
            constraint.num_told += len(output)
            constraint.computed = computed
        return computed

    def _opened(self) -> MaskWriter:
        if self._writer is None:
            from kvrelay.grammar.mask_writer import MaskWriter  # noqa: PLC0415 (only nodes that need it load the library)

            self._writer = MaskWriter.open(self._vocab_size, self._model_dir)
        return self._writer

    def _compute(self, wanted: Sequence[Wanted]) -> None:
        try:
            self._opened().write(wanted)
        except Exception as error:  # the border of the thread: whoever waits for these masks is told
            for item in wanted:
                item.constraint.failure = f"{type(error).__name__}: {error}"
