"""The compute thread: steps in order, layers told, errors attributed to the sequence that causes them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvrelay.core.compute import ComputeThread
from kvrelay.core.machine import LayerComputed, RunStep, StepDone
from kvrelay.core.request import RequestSpec, SamplingParams, Sequence
from kvrelay.core.step import SampledTokens, ScheduledSequence, SequenceFailed, SequenceOutcome, StepPlan, StepResult

TOLD = SampledTokens([7], [])
BROKEN = SequenceFailed("ValueError: out of memory", retryable=True)


@dataclass
class Engine:
    """Three layers; a batch with a sequence called bad breaks after ``layers_before`` of them."""

    layers_before: int = 1
    sizes: list[int] = field(default_factory=list)

    def run(self, plan: StepPlan, on_layer: Callable[[int], None]) -> StepResult:
        names = [item.sequence.spec.request_id for item in plan.batch]
        self.sizes.append(len(names))
        for layer in range(3):
            if layer == self.layers_before and any(name.startswith("bad") for name in names):
                raise ValueError("out of memory")
            on_layer(layer)
        return StepResult(plan.step, [SampledTokens([7], []) for _ in names])


def plan(step: int, *names: str) -> StepPlan:
    sampling = SamplingParams(max_tokens=1, seed=0)
    specs = [RequestSpec(request_id=name, epoch=1, prompt_token_ids=[1], sampling=sampling) for name in names]
    return StepPlan(step, [ScheduledSequence(Sequence(spec), 0, 1, True) for spec in specs])


def events_of(plans: list[StepPlan], *, layer_events: bool, engine: Engine | None = None) -> list[object]:
    posted: queue.SimpleQueue[object] = queue.SimpleQueue()
    thread = ComputeThread(engine or Engine(), posted.put, layer_events=layer_events)
    thread.start()
    for step in plans:
        thread.perform(RunStep(step))
    thread.stop()
    return [posted.get() for _ in range(posted.qsize())]


def done(step: int, *outcomes: SequenceOutcome) -> StepDone:
    return StepDone(StepResult(step, list(outcomes)))


def test_each_step_tells_its_layers_and_then_its_result() -> None:
    layers = [[LayerComputed(step, layer) for layer in range(3)] for step in (1, 2)]
    events = events_of([plan(1, "a"), plan(2, "a", "b")], layer_events=True)
    assert events == [*layers[0], done(1, TOLD), *layers[1], done(2, TOLD, TOLD)]


def test_layers_are_not_told_to_who_does_not_want_them() -> None:
    assert events_of([plan(1, "a"), plan(2, "bad")], layer_events=False) == [done(1, TOLD), done(2, BROKEN)]


def test_a_sequence_that_breaks_a_step_fails_alone_and_the_next_step_runs(caplog: pytest.LogCaptureFixture) -> None:
    events = events_of([plan(3, "bad"), plan(4, "a")], layer_events=False)
    assert events == [done(3, BROKEN), done(4, TOLD)]
    assert "step 3" in caplog.text


@pytest.mark.parametrize("place", range(7))
def test_the_others_of_a_step_that_breaks_are_computed_without_the_one_that_breaks_it(place: int) -> None:
    names = [f"r{number}" for number in range(7)]
    outcomes: list[SequenceOutcome] = [TOLD] * 7
    names[place], outcomes[place] = "bad", BROKEN
    engine = Engine()
    assert events_of([plan(1, *names)], layer_events=False, engine=engine) == [done(1, *outcomes)]
    assert len(engine.sizes) <= 2 * 3 + 1  # halves of 7, of 4 or 3, of 2


def test_several_that_break_a_step_fail_each_with_an_error_of_its_own() -> None:
    events = events_of([plan(1, "bad0", "a", "b", "bad1", "bad2")], layer_events=False)
    assert events == [done(1, BROKEN, TOLD, TOLD, BROKEN, BROKEN)]


@pytest.mark.parametrize("layers_before", range(3))
def test_a_layer_is_told_once_and_not_before_all_parts_of_the_step_have_it(layers_before: int) -> None:
    engine = Engine(layers_before)
    events = events_of([plan(1, "a", "bad", "b", "c")], layer_events=True, engine=engine)
    assert events == [*[LayerComputed(1, layer) for layer in range(3)], done(1, TOLD, BROKEN, TOLD, TOLD)]


def test_layers_that_nobody_has_are_not_told() -> None:
    assert events_of([plan(1, "bad0", "bad1")], layer_events=True) == [LayerComputed(1, 0), done(1, BROKEN, BROKEN)]


def test_stopping_finishes_what_was_queued() -> None:
    assert len(events_of([plan(step, "a") for step in range(20)], layer_events=False)) == 20
