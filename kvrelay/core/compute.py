"""The compute thread: runs an engine's steps beside the shell's loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, TypeAlias

from kvrelay.core.machine import LayerComputed, RunStep, StepDone
from kvrelay.core.step import SequenceFailed, SequenceOutcome, StepPlan, StepResult

logger = logging.getLogger(__name__)

OnLayer: TypeAlias = Callable[[int], None]


class RunsSteps(Protocol):
    """The part of an engine that this thread uses (see ``kvrelay.engine.interface``)."""

    def run(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        """Compute one step."""


class ComputeThread:
    """One thread that runs steps in order and posts LayerComputed and StepDone events.

    A step always ends with StepDone: what the engine raises becomes the outcome of the sequences that cause it.

    ``layer_events`` off spares a role that has no use for LayerComputed one wake-up per layer.
    """

    def __init__(self, engine: RunsSteps, post: Callable[[object], None], *, layer_events: bool) -> None:
        self._engine = engine
        self._post = post
        self._layer_events = layer_events
        self._plans: SimpleQueue[StepPlan | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def perform(self, action: RunStep) -> None:
        """Queue a step."""
        self._plans.put(action.plan)

    def stop(self) -> None:
        """Finish the step that runs, then end the thread."""
        self._plans.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (plan := self._plans.get()) is not None:
            self._post(self._run(plan))

    def _run(self, plan: StepPlan) -> StepDone:
        layers = _Layers(plan.step, self._post if self._layer_events else _ignore)
        outcomes = self._outcomes(plan, layers.post, layers.note)
        layers.post_noted()
        return StepDone(StepResult(plan.step, outcomes))

    def _outcomes(self, plan: StepPlan, on_layer: OnLayer, on_layer_of_part: OnLayer) -> list[SequenceOutcome]:
        """Run ``plan``; if the engine raises, run its halves, and so on, until what raises is one sequence alone.

        Computing tokens once more is safe: it writes the same KV, but for rounding, to the same place.
        """
        try:
            return self._engine.run(plan, on_layer).outcomes
        except Exception as error:  # the border of the engine: whatever it raised, the batch gets an answer
            logger.exception("step %d failed with %d sequences", plan.step, len(plan.batch))
            reason = f"{type(error).__name__}: {error}"
        if len(plan.batch) <= 1:
            return [SequenceFailed(reason, retryable=True) for _ in plan.batch]
        middle = len(plan.batch) // 2
        halves = [StepPlan(plan.step, batch) for batch in (plan.batch[:middle], plan.batch[middle:])]
        return [outcome for half in halves for outcome in self._outcomes(half, on_layer_of_part, on_layer_of_part)]


class _Layers:
    """Posts each layer of a step once, in order, as soon as all of the step has it.

    Layers of parts of the step are only noted, and posted when all parts have been run.
    """

    def __init__(self, step: int, post: Callable[[object], None]) -> None:
        self._step = step
        self._post = post
        self._num_posted = 0
        self._num_noted = 0

    def post(self, layer: int) -> None:
        """Post ``layer``."""
        self._num_posted = layer + 1
        self._post(LayerComputed(self._step, layer))

    def note(self, layer: int) -> None:
        """Note that a part of the step has ``layer``."""
        self._num_noted = max(self._num_noted, layer + 1)

    def post_noted(self) -> None:
        """Post the layers that were noted only."""
        for layer in range(self._num_posted, self._num_noted):
            self.post(layer)


def _ignore(event: object) -> None:
    """Take an event that nobody wants."""
