"""The compute thread: runs an engine's steps beside the shell's loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from kvrelay.core.machine import LayerComputed, RunStep, StepDone, StepFailed
from kvrelay.core.step import StepPlan, StepResult

logger = logging.getLogger(__name__)


class RunsSteps(Protocol):
    """The part of an engine that this thread uses (see ``kvrelay.engine.interface``)."""

    def run(self, plan: StepPlan, on_layer: Callable[[int], None]) -> StepResult:
        """Compute one step."""


class ComputeThread:
    """One thread that runs steps in order and posts LayerComputed, StepDone and StepFailed events.

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

    def _run(self, plan: StepPlan) -> StepDone | StepFailed:
        def on_layer(layer: int) -> None:
            if self._layer_events:
                self._post(LayerComputed(plan.step, layer))

        try:
            return StepDone(self._engine.run(plan, on_layer))
        except Exception as error:  # the border of the engine: whatever it raised, the batch gets an answer
            logger.exception("step %d failed", plan.step)
            return StepFailed(plan.step, f"{type(error).__name__}: {error}")
