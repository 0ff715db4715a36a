"""The compute thread: steps in order, layers told, failures answered."""

from __future__ import annotations

import queue
from collections.abc import Callable

import pytest

from kvrelay.core.compute import ComputeThread
from kvrelay.core.machine import LayerComputed, RunStep, StepDone, StepFailed
from kvrelay.core.step import StepPlan, StepResult


class Engine:
    """Two layers; step 3 breaks between them."""

    def run(self, plan: StepPlan, on_layer: Callable[[int], None]) -> StepResult:
        on_layer(0)
        if plan.step == 3:
            raise ValueError("out of memory")
        on_layer(1)
        return StepResult(plan.step, [])


def events_of(steps: list[int], *, layer_events: bool) -> list[object]:
    posted: queue.SimpleQueue[object] = queue.SimpleQueue()
    thread = ComputeThread(Engine(), posted.put, layer_events=layer_events)
    thread.start()
    for step in steps:
        thread.perform(RunStep(StepPlan(step, [])))
    thread.stop()
    return [posted.get() for _ in range(posted.qsize())]


def test_each_step_tells_its_layers_and_then_its_result() -> None:
    assert events_of([1, 2], layer_events=True) == [
        LayerComputed(1, 0),
        LayerComputed(1, 1),
        StepDone(StepResult(1, [])),
        LayerComputed(2, 0),
        LayerComputed(2, 1),
        StepDone(StepResult(2, [])),
    ]


def test_layers_are_not_told_to_who_does_not_want_them() -> None:
    assert events_of([1, 2], layer_events=False) == [StepDone(StepResult(1, [])), StepDone(StepResult(2, []))]


def test_a_step_that_fails_is_answered_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    assert events_of([3, 4], layer_events=False) == [
        StepFailed(3, "ValueError: out of memory"),
        StepDone(StepResult(4, [])),
    ]
    assert "step 3" in caplog.text


def test_stopping_finishes_what_was_queued() -> None:
    assert len(events_of(list(range(10, 30)), layer_events=False)) == 20
