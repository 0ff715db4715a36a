"""The compute thread: runs an engine's steps outside the shell's loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, TypeAlias

from kvrelay.machine.contract import LayersComputed, StepDone, StepFailed
from kvrelay.protocol.messages.engine import StepPlan, StepResult

logger = logging.getLogger(__name__)

OnLayer: TypeAlias = Callable[[int], None]


class RunsSteps(Protocol):
    """The methods of an engine that this thread uses (see ``kvrelay.engine.interface``)."""

    max_plans_in_flight: int

    def run(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        """Compute one step."""


class ComputeThread:
    """Gives an engine that computes one step at a time the interface of ``kvrelay.engine.interface.EnginePort``.

    One thread runs the steps in order. For each it posts LayersComputed events, then StepDone, or StepFailed if the
    engine raises.

    ``layer_events`` off spares a role that has no use for LayersComputed one wake-up per layer.
    """

    def __init__(self, engine: RunsSteps, post: Callable[[object], None], *, layer_events: bool) -> None:
        self.max_plans_in_flight = engine.max_plans_in_flight
        self._engine = engine
        self._post = post
        self._layer_events = layer_events
        self._plans: SimpleQueue[StepPlan | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a step."""
        self._plans.put(plan)

    def stop(self) -> None:
        """Finish the queued steps and end the thread."""
        self._plans.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (plan := self._plans.get()) is not None:
            self._post(self._run(plan))

    def _run(self, plan: StepPlan) -> StepDone | StepFailed:
        def on_layer(layer: int) -> None:
            if self._layer_events:
                self._post(LayersComputed(plan.step, range(layer, layer + 1)))

        try:
            return StepDone(self._engine.run(plan, on_layer))
        except Exception as error:  # the border of the engine: whatever it raised, the machine gets an answer
            logger.exception("step %d failed", plan.step)
            return StepFailed(plan.step, f"{type(error).__name__}: {error}")
