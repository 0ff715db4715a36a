"""What a decode node plans while a plan is in flight."""

from __future__ import annotations

from typing import Any

import pytest
from support.machines import ROUTER, NodeDesk, spec
from support.scheduling import Desk, names

from decode_node.schedule import Schedule
from kvrelay.core.config import Role
from kvrelay.core.machine import StepFailed
from kvrelay.core.messages.node_to_router import RequestFailed
from kvrelay.core.messages.router_to_node import Abort, Generate
from kvrelay.node.in_flight import PlanInFlight


def submit(desk: Desk, schedule: Schedule) -> PlanInFlight[Any]:
    """Put a decision in flight, as the machine does."""
    scheduler = desk.scheduler
    plan = scheduler.plans.write(len(scheduler.in_flight) + 1, schedule.requests, schedule.chunks)
    in_flight = PlanInFlight(plan, schedule.requests, schedule.chunks, desk.now)
    scheduler.in_flight.begin(in_flight)
    return in_flight


def ahead_of(desk: Desk) -> Schedule:
    """Put the next step in flight; return what is planned behind it."""
    submit(desk, desk.schedule())
    return desk.scheduler.schedule_ahead(desk.now)


def told(schedule: Schedule) -> list[tuple[str, int, int, bool]]:
    return [
        (request.spec.request_id, chunk.start, chunk.num_tokens, chunk.awaits)
        for request, chunk in zip(schedule.requests, schedule.chunks, strict=True)
    ]


def test_a_decode_goes_on_from_the_token_that_is_awaited() -> None:
    desk = Desk()
    desk.decode("a", prompt=5)
    assert told(ahead_of(desk)) == [("a", 6, 1, True)]


def test_a_decode_gets_the_block_that_its_awaited_token_needs() -> None:
    desk = Desk(num_blocks=2, block_size=4)
    one = desk.decode("a", prompt=3)  # the newest token is the fourth
    schedule = ahead_of(desk)
    assert told(schedule) == [("a", 4, 1, True)]
    assert len(one.block_table) == 2


def test_if_not_all_can_grow_nothing_is_planned_and_nobody_gives_way() -> None:
    desk = Desk(num_blocks=3, block_size=4)
    requests = [desk.decode(name, prompt=3) for name in "ab"]
    schedule = ahead_of(desk)
    assert told(schedule) == []
    assert schedule.preempted == [] and [len(one.block_table) for one in requests] == [1, 1]


def test_the_last_token_a_request_may_have_is_not_followed() -> None:
    desk = Desk()
    desk.decode("a", output=1, max_tokens=2)
    desk.decode("b", output=1, max_tokens=3)
    assert names(ahead_of(desk).requests) == ["b"]


def test_a_request_that_is_in_no_plan_is_planned_as_it_stands() -> None:
    desk = Desk()
    desk.decode("a", prompt=5)
    submit(desk, desk.schedule())
    desk.decode("late", prompt=9)
    assert told(desk.scheduler.schedule_ahead(desk.now)) == [("a", 6, 1, True), ("late", 9, 1, False)]


def test_a_prompt_goes_on_chunk_by_chunk_and_then_decodes() -> None:
    desk = Desk(max_num_batched_tokens=8)
    desk.prefill("p", 12)
    submit(desk, desk.schedule())
    second = desk.scheduler.schedule_ahead(desk.now)
    assert told(second) == [("p", 8, 4, False)]
    submit(desk, second)
    assert told(desk.scheduler.schedule_ahead(desk.now)) == [("p", 12, 1, True)]


def test_a_prompt_whose_last_chunk_is_in_flight_takes_nothing_of_the_budget() -> None:
    desk = Desk(max_num_batched_tokens=8)
    desk.prefill("p", 6, max_tokens=1)
    desk.prefill("q", 20)
    schedule = desk.schedule()
    assert told(schedule) == [("p", 0, 6, False), ("q", 0, 2, False)]
    submit(desk, schedule)
    assert told(desk.scheduler.schedule_ahead(desk.now)) == [("q", 2, 8, False)]


def test_newcomers_are_let_in_as_ever() -> None:
    desk = Desk(max_num_batched_tokens=8)
    desk.decode("a")
    submit(desk, desk.schedule())
    desk.wait("n", 6)
    schedule = desk.scheduler.schedule_ahead(desk.now)
    assert names(schedule.admitted) == ["n"]
    assert told(schedule) == [("a", 5, 1, True), ("n", 0, 6, False)]


def test_decodes_beyond_the_budget_take_turns() -> None:
    desk = Desk(max_num_batched_tokens=2)
    for name in "abcd":
        desk.decode(name)
    first = desk.schedule()
    submit(desk, first)
    assert sorted(names(first.requests) + names(desk.scheduler.schedule_ahead(desk.now).requests)) == list("abcd")


def test_with_guesses_nobody_decodes_while_a_decode_is_in_flight() -> None:
    desk = Desk(speculative={"method": "naive"}, max_num_batched_tokens=8)
    desk.decode("a")
    submit(desk, desk.schedule())
    desk.decode("late")
    desk.prefill("p", 6)
    assert told(desk.scheduler.schedule_ahead(desk.now)) == [("p", 0, 6, False)]


@pytest.mark.parametrize("fits", [False, True])
def test_an_urgent_request_that_needs_blocks_of_others_waits_for_the_plan_in_flight(fits: bool) -> None:
    desk = Desk(num_blocks=8, block_size=4, enable_priority_scheduling=True, priority_aging_s=1000.0)
    desk.decode("a", prompt=12, priority=5)
    desk.decode("b", prompt=8, priority=5)
    submit(desk, desk.schedule())
    desk.wait("urgent", 4 if fits else 16, priority=0)
    schedule = desk.scheduler.schedule_ahead(desk.now)
    assert names(schedule.requests) == (["a", "b", "urgent"] if fits else [])
    assert schedule.preempted == []


def test_blocks_that_a_plan_in_flight_reads_are_exchanged_when_it_is_over() -> None:
    """Another request has published the same contents meanwhile: the copies must not be given away yet."""
    desk = Desk(num_blocks=8, block_size=4, max_num_batched_tokens=8)
    tokens = desk.tokens(12)
    one, other = desk.prefill("a", tokens), desk.prefill("b", tokens)
    one.num_computed_tokens = other.num_computed_tokens = 8
    desk.scheduler.publish(one)
    submit(desk, desk.schedule())
    copies = list(other.block_table)
    desk.scheduler.publish(other)
    assert list(other.block_table) == copies
    desk.scheduler.in_flight.end(StepFailed(1, "the test says so"))
    schedule = desk.schedule()
    assert list(other.block_table[:2]) == list(one.block_table[:2])
    plan = desk.scheduler.plans.write(2, schedule.requests, schedule.chunks)
    assert [change.replaced for change in plan.changed] == [[(0, one.block_table[0]), (1, one.block_table[1])]]


# ---------------------------------------------------------------- the machine


def mixed_desk(*names: str, **sections: dict[str, Any]) -> NodeDesk:
    desk = NodeDesk(Role.MIXED, plans_in_flight=2, **sections)
    for number, name in enumerate(names):
        prompt = [100 * number + place for place in range(6)]
        desk.hear(ROUTER, Generate(request=spec(name, prompt, max_tokens=20, sampling={"stop_token_ids": [9]})))
    return desk


def test_a_stop_token_ends_a_request_and_its_blocks_are_held_until_the_next_step_is_over() -> None:
    desk = mixed_desk("a")
    assert len(desk.plans) == 2 and desk.plans[1].batch[0].awaits
    desk.finish_step(9)
    assert desk.num_used > 0
    desk.finish_step(4)
    assert desk.num_used == 0
    desk.machine.assert_quiescent()


def test_an_abort_is_over_when_both_plans_are() -> None:
    desk = mixed_desk("a")
    desk.hear(ROUTER, Abort(request_id="a", epoch=1))
    desk.finish_step()
    assert desk.num_used > 0
    desk.finish_step()
    desk.machine.assert_quiescent()


def test_a_sequence_that_fails_is_reported_once() -> None:
    desk = mixed_desk("a", "b")
    while len(desk.plans[0].batch) < 2:
        desk.finish_step()
    desk.fail_step("a")
    desk.fail_step("a")
    assert [failed.request_id for failed in desk.sent(RequestFailed)] == ["a"]
    desk.run_steps()
    desk.machine.assert_quiescent()


def test_a_step_that_fails_as_a_whole_ends_its_requests_and_no_others() -> None:
    desk = mixed_desk("a", "b", scheduler={"max_num_seqs": 1})
    desk.tell(StepFailed(desk.plans.popleft().step, "ValueError: broken"))
    [failed] = desk.sent(RequestFailed)
    assert (failed.request_id, failed.error.message, failed.error.retryable) == ("a", "ValueError: broken", True)
    desk.finish_step()
    desk.run_steps()
    assert [failure.request_id for failure in desk.sent(RequestFailed)] == ["a"]
    desk.machine.assert_quiescent()
