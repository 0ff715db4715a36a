"""The compute thread: steps in order, layers told, an answer to each plan."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvrelay.engine.compute_thread import ComputeThread, compute_for
from kvrelay.errors import DeviceError
from kvrelay.machine.contract import EngineLost, LayersComputed, StepDone, StepFailed
from kvrelay.protocol.ids import SequenceId
from kvrelay.protocol.messages.engine import SampledTokens, ScheduledTokens, StepPlan, StepResult

BROKEN, FATAL = SequenceId(13), SequenceId(14)
LAYERS = range(2), range(2, 3)


@dataclass
class Engine:
    """Tells two layers at once, then the third. A batch with sequence 13 breaks before that, 14 breaks the device."""

    max_plans_in_flight: int = 2
    steps: list[int] = field(default_factory=list)

    def run(self, plan: StepPlan, on_layers: Callable[[range], None]) -> StepResult:
        self.steps.append(plan.step)
        for layers in LAYERS:
            on_layers(layers)
            if any(item.id == BROKEN for item in plan.batch):
                raise ValueError("out of memory")
            if any(item.id == FATAL for item in plan.batch):
                raise DeviceError("an illegal address")
        return StepResult(step=plan.step, outcomes={item.id: SampledTokens([7], []) for item in plan.batch})


def plan(step: int, *ids: int) -> StepPlan:
    return StepPlan(step=step, batch=[ScheduledTokens(SequenceId(id), 0, 1, True, 0) for id in ids])


def events_of(plans: list[StepPlan], *, layer_events: bool) -> list[object]:
    posted: queue.SimpleQueue[object] = queue.SimpleQueue()
    thread = ComputeThread(Engine(), posted.put, layer_events=layer_events)
    thread.start()
    for step in plans:
        thread.submit(step)
    thread.stop()
    return [posted.get() for _ in range(posted.qsize())]


def done(step: int, *ids: int) -> StepDone:
    return StepDone(StepResult(step=step, outcomes={SequenceId(id): SampledTokens([7], []) for id in ids}))


def test_each_step_tells_its_layers_and_then_its_result() -> None:
    layers = [[LayersComputed(step, layers) for layers in LAYERS] for step in (1, 2)]
    events = events_of([plan(1, 1), plan(2, 1, 2)], layer_events=True)
    assert events == [*layers[0], done(1, 1), *layers[1], done(2, 1, 2)]


def test_layers_are_not_told_to_who_does_not_want_them() -> None:
    assert events_of([plan(1, 1), plan(2, 2)], layer_events=False) == [done(1, 1), done(2, 2)]


def test_an_engine_that_raises_fails_the_step_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    events = events_of([plan(3, 1, 13), plan(4, 1)], layer_events=True)
    assert events[:2] == [LayersComputed(3, LAYERS[0]), StepFailed(3, "ValueError: out of memory")]
    assert events[-1] == done(4, 1)
    assert "step 3 failed" in caplog.text


def test_a_lost_device_is_told_from_a_step_that_failed() -> None:
    assert events_of([plan(3, 1, 14)], layer_events=False) == [EngineLost("an illegal address")]


def test_the_thread_takes_as_many_plans_ahead_as_its_engine() -> None:
    assert ComputeThread(Engine(), print, layer_events=False).max_plans_in_flight == 2


def test_stopping_finishes_what_was_queued() -> None:
    assert len(events_of([plan(step, 1) for step in range(20)], layer_events=False)) == 20


class Pipelined:
    """An engine whose first step is over only when the second has been launched."""

    max_plans_in_flight = 2

    def __init__(self) -> None:
        self.second_launched = threading.Event()

    def begin(self, plan: StepPlan) -> PipelinedStep:
        return PipelinedStep(self, plan)

    def run(self, plan: StepPlan, on_layers: Callable[[range], None]) -> StepResult:
        raise AssertionError("begin is quicker")


class PipelinedStep:
    def __init__(self, engine: Pipelined, plan: StepPlan) -> None:
        self._engine, self._plan = engine, plan

    def launch(self) -> None:
        if self._plan.step == 2:
            self._engine.second_launched.set()

    def finish(self, on_layers: Callable[[range], None]) -> StepResult:
        if self._plan.step == 1:
            assert self._engine.second_launched.wait(60)
        return Engine().run(self._plan, on_layers)


def test_a_step_is_launched_while_another_is_computed_and_answered_after_it() -> None:
    posted: queue.SimpleQueue[object] = queue.SimpleQueue()
    threads = compute_for(Pipelined(), posted.put, layer_events=True)
    threads.start()
    for step in (plan(1, 1), plan(2, 13), plan(3, 1)):
        threads.submit(step)
    threads.stop()
    events = [posted.get() for _ in range(posted.qsize())]
    layers = [[LayersComputed(step, layers) for layers in LAYERS] for step in (1, 2, 3)]
    failed = StepFailed(2, "ValueError: out of memory")
    assert events == [*layers[0], done(1, 1), layers[1][0], failed, *layers[2], done(3, 1)]


def test_an_engine_without_a_pipeline_has_one_thread() -> None:
    assert isinstance(compute_for(Engine(), print, layer_events=False), ComputeThread)
