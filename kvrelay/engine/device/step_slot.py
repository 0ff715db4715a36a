"""Memory of one step in flight: what is copied to the device for it, and where its results go."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.engine.device.framework import Framework, Stream, Tensor
from kvrelay.engine.device.operations import MOST_LOGPROBS, Sampled

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

_ALIGNMENT = 4
"""Words: Triton compiles anew for an address that is not a multiple of 16 bytes."""


def padded(num_words: int) -> int:
    """Return the words that ``num_words`` take, so that what lies behind them is aligned."""
    return max(_ALIGNMENT, num_words + -num_words % _ALIGNMENT)


class UploadArena:
    """Staging memory that the arrays of one step are copied from, while the host goes on.

    It is taken piece by piece and given back as a whole, when the device has read it.
    """

    def __init__(self, framework: Framework, num_words: int) -> None:
        self._framework = framework
        self._used = 0
        self._host, self._staging = framework.staging(padded(num_words))
        self._outgrown: list[Tensor] = []

    def clear(self) -> None:
        """Take all of it back."""
        self._used = 0
        self._outgrown.clear()

    def take(self, num_words: int) -> tuple[Int32, Tensor]:
        """Return memory with undefined content, as an array and as a tensor."""
        begin, end = self._used, self._used + padded(num_words)
        if end > len(self._host):
            self._outgrown.append(self._staging)  # copies from it are under way
            self._host, self._staging = self._framework.staging(2 * end)
            begin, end = 0, padded(num_words)
        self._used = end
        return self._host[begin : begin + num_words], self._staging[begin : begin + num_words]

    def copy_to(self, target: Tensor, array: npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> None:
        """Start the copy of ``array`` to ``target``, of the same size and type, in the current stream."""
        words, staging = self.take(array.size)
        words[:] = np.ascontiguousarray(array).reshape(-1).view(np.int32)
        self._framework.copy(self._framework.typed(target, "int32", (array.size,)), staging)

    def upload(self, array: Int32) -> Tensor:
        """Return a copy of ``array`` on the device."""
        target = self._framework.empty(array.shape, "int32")
        self.copy_to(target, array)
        return target


class Results(NamedTuple):
    """Of a step: tokens by sampling row, their log probabilities (None: nobody asks), rows that are not finite."""

    tokens: Int32
    top_tokens: Int32 | None
    logprobs: Float32 | None
    broken: Int32 | None


class StepSlot:
    """Room for one step in flight of at most ``num_rows`` rows. ``done``: the device has computed and copied it all."""

    def __init__(self, framework: Framework, num_rows: int, upload_words: int) -> None:
        width = 1 + MOST_LOGPROBS
        self._framework = framework
        self.arena = UploadArena(framework, upload_words)
        self.done = framework.event()
        self._tokens, self._token_staging = framework.staging(num_rows)
        self._broken, self._broken_staging = framework.staging(num_rows)
        self._tops, self._top_staging = framework.staging(num_rows * width)
        logprobs, staging = framework.staging(num_rows * width)
        self._tops = self._tops.reshape(-1, width)
        self._top_staging = framework.typed(self._top_staging, "int32", (num_rows, width))
        self._logprobs = logprobs.view(np.float32).reshape(-1, width)
        self._logprob_staging = framework.typed(staging, "float32", (num_rows, width))

    def fetch_prompt(self, scored: Sampled, first: int) -> Results:
        """Start the copies of log probabilities of prompt tokens to rows from ``first`` on, which nothing else takes.

        Call before ``fetch``.
        """
        rows = slice(first, first + scored.tokens.shape[0])
        self._framework.copy(self._token_staging[rows], scored.tokens)
        self._framework.copy(self._top_staging[rows], scored.top_tokens)
        self._framework.copy(self._logprob_staging[rows], scored.logprobs)
        return Results(self._tokens[rows], self._tops[rows], self._logprobs[rows], None)

    def fetch(self, sampled: Sampled | None, broken: Tensor | None, with_logprobs: bool, stream: Stream) -> Results:
        """Start the copies of what a step gives; return where it is when the step is ``done``."""
        copy, count = self._framework.copy, 0 if sampled is None else sampled.tokens.shape[0]
        rows = 0 if broken is None else broken.shape[0]
        if sampled is not None:
            copy(self._token_staging[:count], sampled.tokens)
            if with_logprobs:
                copy(self._top_staging[:count], sampled.top_tokens)
                copy(self._logprob_staging[:count], sampled.logprobs)
        if broken is not None:
            copy(self._broken_staging[:rows], broken)
        self.done.record(stream)
        with_logprobs &= count > 0
        return Results(
            self._tokens[:count],
            self._tops[:count] if with_logprobs else None,
            self._logprobs[:count] if with_logprobs else None,
            None if broken is None else self._broken[:rows],
        )
