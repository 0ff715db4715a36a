"""Finding the sequence that breaks a step, so that the others get their tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.protocol.messages.engine import SequenceFailed, SequenceOutcome

logger = logging.getLogger(__name__)

OnLayer: TypeAlias = Callable[[int], None]
Compute: TypeAlias = Callable[[list[ScheduledSequence], OnLayer], list[SequenceOutcome]]
"""Computes a batch and tells each layer; raises if anything goes wrong that it cannot lay to one sequence."""


def compute_isolated(
    step: int, batch: list[ScheduledSequence], compute: Compute, on_layer: OnLayer
) -> list[SequenceOutcome]:
    """Return what ``compute`` makes of ``batch``; if it raises, of its halves, and so on.

    What raises as one sequence alone is the error of that sequence. Computing tokens once more is safe: it writes the
    same KV to the same place. ``on_layer`` is called once for each layer, in order, as soon as all of the batch has it.
    """
    layers = _Layers(on_layer)
    outcomes = _outcomes(step, batch, compute, layers.tell, layers.note)
    layers.tell_noted()
    return outcomes


def _outcomes(
    step: int, batch: list[ScheduledSequence], compute: Compute, on_layer: OnLayer, on_layer_of_part: OnLayer
) -> list[SequenceOutcome]:
    try:
        return compute(batch, on_layer)
    except Exception as error:  # the border of the step: whatever was raised, each sequence gets an outcome
        logger.exception("step %d failed with %d sequences", step, len(batch))
        reason = f"{type(error).__name__}: {error}"
    if len(batch) <= 1:
        return [SequenceFailed(reason, retryable=True) for _ in batch]
    middle = len(batch) // 2
    halves = (batch[:middle], batch[middle:])
    return [
        outcome for half in halves for outcome in _outcomes(step, half, compute, on_layer_of_part, on_layer_of_part)
    ]


class _Layers:
    """Tells each layer of a step once, in order.

    Layers of parts of the step are only noted, and told when all parts have been computed.
    """

    def __init__(self, on_layer: OnLayer) -> None:
        self._on_layer = on_layer
        self._num_told = 0
        self._num_noted = 0

    def tell(self, layer: int) -> None:
        """Tell ``layer``."""
        self._num_told = layer + 1
        self._on_layer(layer)

    def note(self, layer: int) -> None:
        """Note that a part of the step has ``layer``."""
        self._num_noted = max(self._num_noted, layer + 1)

    def tell_noted(self) -> None:
        """Tell the layers that were noted only."""
        for layer in range(self._num_told, self._num_noted):
            self.tell(layer)
