"""Predicted times to first token, and what has become of them."""

from __future__ import annotations

from typing import NamedTuple

from kvrelay.machine.histogram import Histogram
from kvrelay.machine.speed import Speed
from kvrelay.protocol.histograms import FIRST_TOKEN_BOUNDS_S
from kvrelay.protocol.prompt_lengths import NUM_LENGTH_CLASSES, length_class

TRIED_AGAIN_S = 60.0
"""Seconds after which a prompt is let in however late its first token is predicted, if no similar one was meanwhile."""


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

    Who refuses all prompts of a class learns nothing of them any more, so one is let in now and then (``may_refuse``).
    """

    def __init__(self) -> None:
        self._factors = [Speed() for _ in range(NUM_LENGTH_CLASSES)]
        self._prefill_factors = [Speed() for _ in range(NUM_LENGTH_CLASSES)]
        self._let_in_s: list[float | None] = [None] * NUM_LENGTH_CLASSES
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

        False if none of similar length was let in for ``TRIED_AGAIN_S``, counted from when the first was to be refused.
        """
        which = length_class(prediction.num_uncached)
        let_in_s = self._let_in_s[which]
        if let_in_s is None:
            let_in_s = self._let_in_s[which] = now
        return now - let_in_s < TRIED_AGAIN_S

    def let_in(self, prediction: Prediction, now: float) -> None:
        """Note that a node gets a prompt with this prediction at time ``now``."""
        self._let_in_s[length_class(prediction.num_uncached)] = now

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
