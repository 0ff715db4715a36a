"""Compute threads: they run an engine's steps outside the node's loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from kvrelay.engine.interface import EnginePort, EngineStep, OnLayers, StepPipeline, StepRunner
from kvrelay.errors import DeviceError
from kvrelay.machine.contract import EngineLost, LayersComputed, StepDone, StepFailed
from kvrelay.protocol.messages.engine import StepPlan, StepResult

logger = logging.getLogger(__name__)


def compute_for(engine: StepRunner | StepPipeline, post: Callable[[object], None], *, layer_events: bool) -> EnginePort:
    """Return the threads for ``engine``; the parameters are those of ComputeThread."""
    if isinstance(engine, StepPipeline):
        return PipelinedCompute(engine, post, layer_events=layer_events)
    return ComputeThread(engine, post, layer_events=layer_events)


class ComputeThread:
    """Gives an engine that computes one step at a time the interface of ``EnginePort``.

    One thread runs the steps in order. For each it posts LayersComputed events, then StepDone; StepFailed if the engine
    raises, or EngineLost if it raises DeviceError.

    ``layer_events`` off spares a role that has no use for LayersComputed its wake-ups.
    """

    def __init__(self, engine: StepRunner, post: Callable[[object], None], *, layer_events: bool) -> None:
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

    def _run(self, plan: StepPlan) -> StepDone | StepFailed | EngineLost:
        return _answer(plan.step, lambda on_layers: self._engine.run(plan, on_layers), self._post, self._layer_events)


class PipelinedCompute:
    """The compute thread of an engine that launches a step while another is computed.

    One thread launches, so that a plan reaches the device at once; another waits for each step and answers.
    """

    def __init__(self, engine: StepPipeline, post: Callable[[object], None], *, layer_events: bool) -> None:
        self.max_plans_in_flight = engine.max_plans_in_flight
        self._engine = engine
        self._post = post
        self._layer_events = layer_events
        self._plans: SimpleQueue[StepPlan | None] = SimpleQueue()
        self._steps: SimpleQueue[tuple[int, EngineStep] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("launch", self._launch), ("finish", self._finish))
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a step."""
        self._plans.put(plan)

    def stop(self) -> None:
        """Finish the steps that are queued, then end the threads."""
        self._plans.put(None)
        for thread in self._threads:
            thread.join()

    def _launch(self) -> None:
        while (plan := self._plans.get()) is not None:
            step = self._engine.begin(plan)
            self._steps.put((plan.step, step))
            step.launch()
        self._steps.put(None)

    def _finish(self) -> None:
        while (entry := self._steps.get()) is not None:
            number, step = entry
            self._post(_answer(number, step.finish, self._post, self._layer_events))


def _answer(
    step: int, compute: Callable[[OnLayers], StepResult], post: Callable[[object], None], layer_events: bool
) -> StepDone | StepFailed | EngineLost:
    """Return what comes of ``compute``; post its layers if ``layer_events``."""

    def on_layers(layers: range) -> None:
        if layer_events:
            post(LayersComputed(step, layers))

    try:
        return StepDone(compute(on_layers))
    except DeviceError as error:
        return EngineLost(error.message)
    except Exception as error:  # the border of the engine: whatever it raised, the machine gets an answer
        logger.exception("step %d failed", step)
        return StepFailed(step, f"{type(error).__name__}: {error}")
