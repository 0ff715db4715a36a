"""What a decode node plans while a plan is in flight."""

from __future__ import annotations

from typing import Any

import pytest
from support.machines import ROUTER, NodeHarness, spec
from support.scheduling import Desk, names

from decode_node.schedule import Schedule
from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import StepFailed
from kvrelay.node.in_flight import PlanInFlight
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.node_to_router import RequestFailed
from kvrelay.protocol.messages.router_to_node import Abort, Generate


def submit(harness: Desk, schedule: Schedule) -> PlanInFlight[Any]:
    """Put a decision in flight, as the machine does."""
    scheduler = harness.scheduler
    plan = scheduler.plans.write(len(scheduler.in_flight) + 1, schedule.requests, schedule.chunks)
    in_flight = PlanInFlight(plan, schedule.requests, schedule.chunks, harness.now)
    scheduler.in_flight.begin(in_flight)
    return in_flight


def ahead_of(harness: Desk) -> Schedule:
    """Put the next step in flight; return what is planned behind it."""
    submit(harness, harness.schedule())
    return harness.scheduler.schedule_ahead(harness.now)


def told(schedule: Schedule) -> list[tuple[str, int, int, bool]]:
    return [
        (request.spec.request_id, chunk.start, chunk.num_tokens, chunk.awaits)
        for request, chunk in zip(schedule.requests, schedule.chunks, strict=True)
    ]


def test_a_decode_goes_on_from_the_token_that_is_awaited() -> None:
    harness = Desk()
    harness.decode("a", prompt=5)
    assert told(ahead_of(harness)) == [("a", 6, 1, True)]


def test_a_decode_gets_the_block_that_its_awaited_token_needs() -> None:
    harness = Desk(num_blocks=2, block_size=4)
    one = harness.decode("a", prompt=3)  # the newest token is the fourth
    schedule = ahead_of(harness)
    assert told(schedule) == [("a", 4, 1, True)]
    assert len(one.block_table) == 2


def test_if_not_all_can_grow_nothing_is_planned_and_nobody_gives_way() -> None:
    harness = Desk(num_blocks=3, block_size=4)
    requests = [harness.decode(name, prompt=3) for name in "ab"]
    schedule = ahead_of(harness)
    assert told(schedule) == []
    assert schedule.preempted == [] and [len(one.block_table) for one in requests] == [1, 1]


def test_the_last_token_a_request_may_have_is_not_followed() -> None:
    harness = Desk()
    harness.decode("a", output=1, max_tokens=2)
    harness.decode("b", output=1, max_tokens=3)
    assert names(ahead_of(harness).requests) == ["b"]


def test_a_request_that_is_in_no_plan_is_planned_as_it_stands() -> None:
    harness = Desk()
    harness.decode("a", prompt=5)
    submit(harness, harness.schedule())
    harness.decode("late", prompt=9)
    assert told(harness.scheduler.schedule_ahead(harness.now)) == [("a", 6, 1, True), ("late", 9, 1, False)]


def test_a_prompt_goes_on_chunk_by_chunk_and_then_decodes() -> None:
    harness = Desk(max_num_batched_tokens=8)
    harness.prefill("p", 12)
    submit(harness, harness.schedule())
    second = harness.scheduler.schedule_ahead(harness.now)
    assert told(second) == [("p", 8, 4, False)]
    submit(harness, second)
    assert told(harness.scheduler.schedule_ahead(harness.now)) == [("p", 12, 1, True)]


def test_a_prompt_whose_last_chunk_is_in_flight_takes_nothing_of_the_budget() -> None:
    harness = Desk(max_num_batched_tokens=8)
    harness.prefill("p", 6, max_tokens=1)
    harness.prefill("q", 20)
    schedule = harness.schedule()
    assert told(schedule) == [("p", 0, 6, False), ("q", 0, 2, False)]
    submit(harness, schedule)
    assert told(harness.scheduler.schedule_ahead(harness.now)) == [("q", 2, 8, False)]


def test_newcomers_are_let_in_as_ever() -> None:
    harness = Desk(max_num_batched_tokens=8)
    harness.decode("a")
    submit(harness, harness.schedule())
    harness.wait("n", 6)
    schedule = harness.scheduler.schedule_ahead(harness.now)
    assert names(schedule.admitted) == ["n"]
    assert told(schedule) == [("a", 5, 1, True), ("n", 0, 6, False)]


def test_decodes_beyond_the_budget_take_turns() -> None:
    harness = Desk(max_num_batched_tokens=2)
    for name in "abcd":
        harness.decode(name)
    first = harness.schedule()
    submit(harness, first)
    assert sorted(names(first.requests) + names(harness.scheduler.schedule_ahead(harness.now).requests)) == list("abcd")


def test_with_guesses_nobody_decodes_while_a_decode_is_in_flight() -> None:
    harness = Desk(speculative={"method": "naive"}, max_num_batched_tokens=8)
    harness.decode("a")
    submit(harness, harness.schedule())
    harness.decode("late")
    harness.prefill("p", 6)
    assert told(harness.scheduler.schedule_ahead(harness.now)) == [("p", 0, 6, False)]


@pytest.mark.parametrize("fits", [False, True])
def test_an_urgent_request_that_needs_blocks_of_others_waits_for_the_plan_in_flight(fits: bool) -> None:
    harness = Desk(num_blocks=8, block_size=4, enable_priority_scheduling=True, priority_aging_s=1000.0)
    harness.decode("a", prompt=12, priority=5)
    harness.decode("b", prompt=8, priority=5)
    submit(harness, harness.schedule())
    harness.wait("urgent", 4 if fits else 16, priority=0)
    schedule = harness.scheduler.schedule_ahead(harness.now)
    assert names(schedule.requests) == (["a", "b", "urgent"] if fits else [])
    assert schedule.preempted == []


def test_blocks_that_a_plan_in_flight_reads_are_exchanged_when_it_is_over() -> None:
    """Another request has published the same contents meanwhile: the copies must not be given away yet."""
    harness = Desk(num_blocks=8, block_size=4, max_num_batched_tokens=8)
    tokens = harness.tokens(12)
    one, other = harness.prefill("a", tokens), harness.prefill("b", tokens)
    one.num_computed_tokens = other.num_computed_tokens = 8
    harness.scheduler.publisher.publish(one)
    submit(harness, harness.schedule())
    copies = list(other.block_table)
    harness.scheduler.publisher.publish(other)
    assert list(other.block_table) == copies
    harness.scheduler.in_flight.end(StepFailed(1, "the test says so"))
    schedule = harness.schedule()
    assert list(other.block_table[:2]) == list(one.block_table[:2])
    plan = harness.scheduler.plans.write(2, schedule.requests, schedule.chunks)
    assert [change.replaced for change in plan.changed] == [[(0, one.block_table[0]), (1, one.block_table[1])]]


# ---------------------------------------------------------------- the machine


def mixed_harness(*names: str, **sections: dict[str, Any]) -> NodeHarness:
    harness = NodeHarness(Role.MIXED, plans_in_flight=2, **sections)
    for number, name in enumerate(names):
        prompt = [100 * number + place for place in range(6)]
        harness.receive(ROUTER, Generate(request=spec(name, prompt, max_tokens=20, sampling={"stop_token_ids": [9]})))
    return harness


def test_a_stop_token_ends_a_request_and_its_blocks_are_held_until_the_next_step_is_over() -> None:
    harness = mixed_harness("a")
    assert len(harness.plans) == 2 and harness.plans[1].batch[0].awaits
    harness.finish_step(9)
    assert harness.num_used > 0
    harness.finish_step(4)
    assert harness.num_used == 0
    harness.machine.assert_quiescent()


def test_an_abort_is_over_when_both_plans_are() -> None:
    harness = mixed_harness("a")
    harness.receive(ROUTER, Abort(request_id=RequestId("a"), epoch=1))
    harness.finish_step()
    assert harness.num_used > 0
    harness.finish_step()
    harness.machine.assert_quiescent()


def test_a_sequence_that_fails_is_reported_once() -> None:
    harness = mixed_harness("a", "b")
    while len(harness.plans[0].batch) < 2:
        harness.finish_step()
    harness.fail_step("a")
    harness.fail_step("a")
    assert [failed.request_id for failed in harness.sent(RequestFailed)] == ["a"]
    harness.run_steps()
    harness.machine.assert_quiescent()


def test_a_step_that_fails_as_a_whole_ends_its_requests_and_no_others() -> None:
    harness = mixed_harness("a", "b", scheduler={"max_num_seqs": 1})
    harness.post(StepFailed(harness.plans.popleft().step, "ValueError: broken"))
    [failed] = harness.sent(RequestFailed)
    assert (failed.request_id, failed.error.message, failed.error.retryable) == ("a", "ValueError: broken", True)
    assert harness.machine.load().prefill_tokens_per_s == 0.0  # how fast a step fails says nothing
    harness.finish_step()
    harness.run_steps()
    assert [failure.request_id for failure in harness.sent(RequestFailed)] == ["a"]
    harness.machine.assert_quiescent()
