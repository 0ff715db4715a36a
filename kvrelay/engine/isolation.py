"""Finds the sequence that makes a step fail, so that the other sequences get their tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.errors import DeviceError
from kvrelay.protocol.messages.engine import SequenceFailed, SequenceOutcome

logger = logging.getLogger(__name__)

OnLayers: TypeAlias = Callable[[range], None]
"""Told consecutive layers whose KV is in the pool."""

Compute: TypeAlias = Callable[[list[ScheduledSequence], OnLayers], list[SequenceOutcome]]
"""Computes a batch and reports its layers. Raises for an error that it cannot attribute to one sequence."""


def compute_isolated(
    step: int, batch: list[ScheduledSequence], compute: Compute, on_layers: OnLayers
) -> list[SequenceOutcome]:
    """Return the outcomes of ``compute`` for ``batch``. If it raises, compute the halves of the batch, recursively.

    An exception from a batch of one sequence is the error of that sequence. DeviceError is the error of no sequence and
    is raised. Computing tokens again is safe, because it writes the same KV to the same slots. ``on_layers`` is told
    each layer once, in order, when the whole batch has computed it.
    """
    layers = _Layers(on_layers)
    outcomes = _outcomes(step, batch, compute, layers.report, layers.record)
    layers.report_recorded()
    return outcomes


def _outcomes(
    step: int, batch: list[ScheduledSequence], compute: Compute, on_layers: OnLayers, on_layers_of_part: OnLayers
) -> list[SequenceOutcome]:
    try:
        return compute(batch, on_layers)
    except DeviceError:
        raise
    except Exception as error:  # the border of the step: whatever was raised, each sequence gets an outcome
        logger.exception("step %d failed with %d sequences", step, len(batch))
        reason = f"{type(error).__name__}: {error}"
    if len(batch) <= 1:
        return [SequenceFailed(reason, retryable=True) for _ in batch]
    middle = len(batch) // 2
    halves = (batch[:middle], batch[middle:])
    return [
        outcome for half in halves for outcome in _outcomes(step, half, compute, on_layers_of_part, on_layers_of_part)
    ]


class _Layers:
    """Reports each layer of a step once, in order.

    Layers of parts of a step are recorded, and reported when all parts are computed.
    """

    def __init__(self, on_layers: OnLayers) -> None:
        self._on_layers = on_layers
        self._num_reported = 0
        self._num_recorded = 0

    def report(self, layers: range) -> None:
        """Report ``layers``."""
        self._num_reported = layers.stop
        self._on_layers(layers)

    def record(self, layers: range) -> None:
        """Record that a part of the step has computed ``layers``."""
        self._num_recorded = max(self._num_recorded, layers.stop)

    def report_recorded(self) -> None:
        """Report the layers that are recorded but not reported."""
        if self._num_recorded > self._num_reported:
            self.report(range(self._num_reported, self._num_recorded))
