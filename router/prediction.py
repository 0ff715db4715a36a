"""Predicted times to first token, and what has become of them."""

from __future__ import annotations

from typing import NamedTuple

from kvrelay.machine.histogram import Histogram
from kvrelay.machine.speed import Speed
from kvrelay.protocol.histograms import FIRST_TOKEN_BOUNDS_S
from kvrelay.protocol.prompt_lengths import NUM_LENGTH_CLASSES, length_class

TRIED_AGAIN_S = 60.0
"""Seconds without a dispatched prompt of similar length after which one is admitted, whatever is predicted for it."""


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
    has its own factor, and another for the prefill alone, which is too long if first tokens came before its end: the
    speed was measured on steps with few tokens. The histograms only grow.

    Who refuses all prompts of a class learns nothing of them any more: one is admitted now and then (``may_refuse``).
    """

    def __init__(self) -> None:
        self._factors = [Speed() for _ in range(NUM_LENGTH_CLASSES)]
        self._prefill_factors = [Speed() for _ in range(NUM_LENGTH_CLASSES)]
        self._dispatched_s: list[float | None] = [None] * NUM_LENGTH_CLASSES
        self.errors = {direction: Histogram(FIRST_TOKEN_BOUNDS_S) for direction in ("late", "early")}
        """``late``: of first tokens that came later than predicted, or on time."""

    def corrected(self, raw: Prediction, now: float) -> Prediction:
        """Return ``raw`` as much longer, or shorter, as such predictions were too short, or too long, lately."""
        which = length_class(raw.num_uncached)
        ttft_s = raw.ttft_s * _known(self._factors[which], now)
        prefill_s = raw.prefill_s * _known(self._prefill_factors[which], now)
        return raw._replace(queue_s=max(0.0, ttft_s - prefill_s), prefill_s=prefill_s)

    def may_refuse(self, prediction: Prediction, now: float) -> bool:
        """Return whether a prompt may be refused at time ``now`` because of ``prediction``.

        False if none of similar length was dispatched in the last ``TRIED_AGAIN_S``. Until the first one is, this time
        begins with the first refusal.
        """
        which = length_class(prediction.num_uncached)
        dispatched_s = self._dispatched_s[which]
        if dispatched_s is None:
            dispatched_s = self._dispatched_s[which] = now
        return now - dispatched_s < TRIED_AGAIN_S

    def dispatched(self, prediction: Prediction, now: float) -> None:
        """Note that a node gets a prompt with this prediction at time ``now``."""
        self._dispatched_s[length_class(prediction.num_uncached)] = now

    def observe(self, raw: Prediction, corrected: Prediction, real_s: float, now: float) -> None:
        """Note a first token that came after ``real_s``. Predictions without a measured speed correct nothing."""
        if raw.is_measured:
            which = length_class(raw.num_uncached)
            self._factors[which].add(real_s, raw.ttft_s, now)
            self._prefill_factors[which].add(min(real_s, raw.prefill_s), raw.prefill_s, now)
        error_s = real_s - corrected.ttft_s
        self.errors["late" if error_s >= 0 else "early"].observe(abs(error_s))


def _known(factor: Speed, now: float) -> float:
    measured = factor.at(now)
    return 1.0 if measured is None else measured
