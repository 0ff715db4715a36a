"""Predicted times to first token, and what has become of them."""

from __future__ import annotations

from typing import NamedTuple

from kvrelay.machine.histogram import Histogram
from kvrelay.machine.speed import Speed
from kvrelay.protocol.histograms import FIRST_TOKEN_BOUNDS_S
from kvrelay.protocol.prompt_lengths import NUM_LENGTH_CLASSES, length_class


class Prediction(NamedTuple):
    """The time to first token of a request on one node, in seconds: the wait for other prompts and its own prefill.

    ``num_uncached``: the prompt tokens that it has to compute. ``is_measured``: whether the node has measured how fast
    it computes prompts.
    """

    queue_s: float
    prefill_s: float
    num_uncached: int
    is_measured: bool

    @property
    def ttft_s(self) -> float:
        """Seconds from dispatch to the first token."""
        return self.queue_s + self.prefill_s


class Predictions:
    """Corrects predictions by how much later than predicted first tokens came lately, and counts the remaining errors.

    What a prediction does not know is similar for prompts of similar lengths: where the shortest goes first, how many
    shorter ones will come; that a first token comes at the end of a step; waits for blocks. So each class of lengths
    has its own factor. The histograms only grow.
    """

    def __init__(self) -> None:
        self._factors = [Speed() for _ in range(NUM_LENGTH_CLASSES)]
        self.errors = {direction: Histogram(FIRST_TOKEN_BOUNDS_S) for direction in ("late", "early")}
        """``late``: of first tokens that came later than predicted, or on time."""

    def corrected(self, raw: Prediction, now: float) -> Prediction:
        """Return ``raw`` with another wait: the whole is as much longer as such predictions were too short lately."""
        factor = self._factors[length_class(raw.num_uncached)].at(now) or 1.0
        return raw._replace(queue_s=max(0.0, factor * raw.ttft_s - raw.prefill_s))

    def observe(self, raw: Prediction, corrected: Prediction, real_s: float, now: float) -> None:
        """Note a first token that came after ``real_s``. Predictions without a measured speed correct nothing."""
        if raw.is_measured:
            self._factors[length_class(raw.num_uncached)].add(real_s, raw.ttft_s, now)
        error_s = real_s - corrected.ttft_s
        self.errors["late" if error_s >= 0 else "early"].observe(abs(error_s))
