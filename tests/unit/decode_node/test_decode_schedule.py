"""The scheduler of decode and mixed nodes, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest
from support.scheduling import Desk, names

from decode_node.request import TRANSITIONS, DecodeStatus

# ---------------------------------------------------------------- order and budget


def test_decodes_come_first_then_running_prefills_then_newcomers() -> None:
    desk = Desk(max_num_batched_tokens=20, prefill_order="fifo")
    desk.wait("new", 8)
    desk.prefill("chunked", 12, computed=4)
    desk.decode("a")
    desk.decode("b")
    schedule = desk.schedule()
    assert names(schedule.requests) == ["a", "b", "chunked", "new"]
    assert [chunk.num_tokens for chunk in schedule.chunks] == [1, 1, 8, 8]
    assert [chunk.start for chunk in schedule.chunks] == [4, 4, 4, 0]
    assert [chunk.samples for chunk in schedule.chunks] == [True] * 4
    assert names(schedule.admitted) == ["new"]


def test_a_step_never_computes_more_than_the_budget() -> None:
    desk = Desk(num_blocks=64, max_num_batched_tokens=10, prefill_order="fifo")
    desk.prefill("chunked", 30, computed=20)
    desk.decode("a")
    desk.wait("new", 8)
    schedule = desk.schedule()
    assert [chunk.num_tokens for chunk in schedule.chunks] == [1, 9]
    assert [chunk.samples for chunk in schedule.chunks] == [True, False]
    assert not schedule.admitted


def test_a_newcomer_that_is_much_shorter_goes_before_a_prompt_that_has_begun() -> None:
    desk = Desk(num_blocks=64, max_num_batched_tokens=10)
    desk.prefill("chunked", 40, computed=20)
    desk.decode("a")
    desk.wait("long", 30)
    desk.wait("new", 8)
    schedule = desk.schedule()
    assert names(schedule.requests) == ["a", "new", "chunked"]
    assert [chunk.num_tokens for chunk in schedule.chunks] == [1, 8, 1]
    assert names(schedule.admitted) == ["new"]


def test_what_is_in_the_prefix_cache_does_not_count_as_length() -> None:
    desk = Desk(num_blocks=64, max_num_batched_tokens=100)
    history = desk.tokens(48)
    desk.wait("first", history, max_tokens=1)
    desk.run()
    desk.wait("other", 20)
    desk.wait("follow-up", [*history, *desk.tokens(6)])
    assert names(desk.schedule().requests) == ["follow-up", "other"]


def test_what_is_published_while_a_prompt_waits_makes_it_shorter() -> None:
    desk = Desk(num_blocks=64, max_num_batched_tokens=16, max_num_seqs=1)
    common = desk.tokens(16)
    desk.wait("computes", common)
    desk.wait("other", 18)
    desk.wait("shares", [*common, *desk.tokens(5)])
    assert names(desk.scheduler.waiting.ordered(desk.now)) == ["computes", "other", "shares"]
    desk.step()
    assert names(desk.scheduler.waiting.ordered(desk.now)) == ["shares", "other"]


def test_a_prompt_whose_next_block_is_being_computed_comes_after_others() -> None:
    desk = Desk(num_blocks=64, max_num_batched_tokens=8)
    common = desk.tokens(32)
    desk.wait("computes", common)
    desk.step()
    desk.wait("shares", [*common[:12], *desk.tokens(1)])
    desk.wait("longer", 6)
    schedule = desk.step()  # what "shares" lacks is computed from here on
    assert names(schedule.admitted) == ["longer"]
    desk.step()
    assert names(desk.step().admitted) == ["shares"]


def test_a_reservation_is_refused_while_a_prompt_waits_that_has_been_overtaken_enough() -> None:
    desk = Desk(num_blocks=8, prefill_overtake_tokens=20)
    desk.decode("a", prompt=16)
    desk.wait("long", 28)
    desk.schedule()
    assert desk.scheduler.may_reserve(0, 12, desk.now) is None
    desk.scheduler.order.passed(0, 12)
    assert desk.scheduler.may_reserve(0, 12, desk.now) == "prompts that came earlier wait for blocks"
    assert desk.scheduler.may_reserve(0, 8, desk.now) is None


def test_what_is_left_of_the_budget_goes_to_the_next_prompt() -> None:
    desk = Desk(num_blocks=64, max_num_batched_tokens=10)
    for name in "xyz":
        desk.wait(name, 6)
    schedule = desk.schedule()
    assert [chunk.num_tokens for chunk in schedule.chunks] == [6, 4]
    assert names(desk.scheduler.waiting) == ["z"]


def test_more_decodes_than_the_budget_take_turns() -> None:
    desk = Desk(num_blocks=64, max_num_batched_tokens=3)
    requests = [desk.decode(str(number)) for number in range(7)]
    for _ in range(7):
        assert sum(chunk.num_tokens for chunk in desk.step().chunks) == 3
    assert [request.num_output_tokens for request in requests] == [1 + 3] * 7


def test_max_num_seqs_counts_everybody_who_has_blocks() -> None:
    desk = Desk(max_num_seqs=4)
    desk.decode("a")
    desk.prefill("b", 8, computed=4)
    desk.receive("c", 8)
    desk.wait("d", 4)
    desk.wait("e", 4)
    assert names(desk.schedule().admitted) == ["d"]


def test_a_running_prefill_that_gets_no_budget_stops_newcomers_and_no_decode() -> None:
    desk = Desk(max_num_batched_tokens=2)
    desk.prefill("chunked", 12)
    desk.decode("a")
    desk.decode("b")
    desk.wait("new", 4)
    schedule = desk.schedule()
    assert names(schedule.requests) == ["a", "b"]
    assert not schedule.admitted


def test_first_come_first_served_even_if_the_second_would_fit() -> None:
    for order, admitted in (("fifo", []), ("shortest_first", ["small"])):
        desk = Desk(num_blocks=8, prefill_order=order)
        desk.decode("a", prompt=12)
        desk.wait("large", 24)
        desk.wait("small", 4)
        assert names(desk.schedule().admitted) == admitted


def test_a_newcomer_begins_behind_its_prefix_hit() -> None:
    desk = Desk(num_blocks=16)
    prompt = desk.tokens(10)
    desk.wait("first", prompt, max_tokens=1)
    desk.step()
    desk.wait("again", prompt)
    schedule = desk.schedule()
    assert [(chunk.start, chunk.num_tokens) for chunk in schedule.chunks] == [(8, 2)]
    assert schedule.requests[0].num_cached_tokens == 8


def test_a_prompt_wholly_in_cache_computes_its_last_token_only() -> None:
    desk = Desk(num_blocks=16)
    prompt = desk.tokens(8)
    desk.wait("first", prompt, max_tokens=1)
    desk.step()
    desk.wait("again", prompt)
    [chunk] = desk.schedule().chunks
    assert (chunk.start, chunk.num_tokens, chunk.samples) == (7, 1, True)


def test_prompts_that_come_together_share_what_they_begin_with() -> None:
    desk = Desk(num_blocks=32)
    common = desk.tokens(16)
    for name in "abc":
        desk.wait(name, common + desk.tokens(3))
    assert names(desk.step().admitted) == ["a"]
    schedule = desk.step()
    assert names(schedule.admitted) == ["b", "c"]
    assert [chunk.num_tokens for chunk in schedule.chunks] == [1, 3, 3]


def test_an_empty_schedule_is_no_step() -> None:
    schedule = Desk().schedule()
    assert not schedule.chunks
    assert not schedule.preempted
    assert schedule.outgrown is None


# ---------------------------------------------------------------- the reserve at the door


def test_the_reserve_keeps_newcomers_out_but_not_decodes_in_need() -> None:
    desk = Desk(num_blocks=12, reserve_policy="fixed_blocks", fixed_blocks={"blocks": 8})
    grown = desk.decode("a", prompt=4, output=1)
    desk.wait("new", 16)
    schedule = desk.schedule()
    assert names(schedule.requests) == ["a"]
    assert len(grown.block_table) == 2  # its second block came out of the reserve


def test_the_reserve_counts_running_prefills_and_reserved_requests_too() -> None:
    for kind in ("decode", "prefill", "receive"):
        desk = Desk(num_blocks=12, reserve_policy="fixed_blocks", fixed_blocks={"blocks": 3})
        getattr(desk, kind)("a", 4)
        assert desk.scheduler.reserved_blocks() == 3


def test_a_running_prefill_goes_on_whatever_the_reserve() -> None:
    desk = Desk(num_blocks=8, reserve_policy="fixed_blocks", fixed_blocks={"blocks": 100})
    desk.prefill("a", 20, computed=8)
    desk.decode("b")
    assert names(desk.schedule().requests) == ["b", "a"]


@pytest.mark.parametrize("policy", ["new_token_ratio", "fixed_blocks", "sglang"])
def test_the_reserve_never_leaves_a_node_idle(policy: str) -> None:
    desk = Desk(num_blocks=8, reserve_policy=policy, fixed_blocks={"blocks": 1000}, watermark=0.9)
    desk.wait("a", 28, max_tokens=4)
    assert names(desk.schedule().admitted) == ["a"]


@pytest.mark.parametrize(
    ("policy", "admitted"), [("none", ["b"]), ("new_token_ratio", []), ("fixed_blocks", []), ("sglang", [])]
)
def test_each_policy_decides_at_the_door(policy: str, admitted: list[str]) -> None:
    desk = Desk(num_blocks=10, reserve_policy=policy)
    desk.decode("a", max_tokens=40)
    desk.wait("b", 8, max_tokens=40)
    assert names(desk.schedule().admitted) == admitted


def test_sglang_charges_a_newcomer_its_own_output_at_the_door() -> None:
    """Whoever runs reserves next to nothing here: it is the newcomer's 40 tokens that do not fit."""
    for clip, admitted in ((40, []), (4, ["b"])):
        sglang = {"init": 0.01, "clip_max_new_tokens": clip}
        desk = Desk(num_blocks=12, reserve_policy="sglang", sglang=sglang)
        desk.decode("a", max_tokens=40)
        desk.wait("b", 8, max_tokens=40)
        assert names(desk.schedule().admitted) == admitted


def test_the_watermark_stays_free_when_one_is_admitted() -> None:
    for watermark, admitted in ((0.0, ["b"]), (0.5, [])):
        desk = Desk(num_blocks=10, watermark=watermark)
        desk.decode("a", prompt=12)
        desk.wait("b", 8)
        assert names(desk.schedule().admitted) == admitted


def test_the_level_falls_only_with_steps_that_schedule_something_and_comes_back_when_idle() -> None:
    desk = Desk(reserve_policy="new_token_ratio", new_token_ratio={"decay": 0.1})

    def level() -> float:
        return desk.scheduler.reserve.level

    request = desk.receive("a", 4, max_tokens=3)
    desk.decode("b", max_tokens=2)
    desk.step()
    assert level() == pytest.approx(0.6)
    for _ in range(3):
        desk.step()
    assert level() == pytest.approx(0.6)  # nothing was scheduled, and it is not idle: a reservation is held
    desk.arrive(request, 4)
    desk.step()
    assert level() == pytest.approx(0.5)
    desk.step()
    assert request in desk.finished
    assert level() == pytest.approx(0.4)
    desk.step()
    assert level() == 0.7


# ---------------------------------------------------------------- preemption: who


def full(desk: Desk) -> int:
    """Take every free block away from the desk; return how many."""
    free = desk.kv.num_free
    desk.kv.allocate(free)
    return free


def test_all_running_are_prefills_so_there_is_no_victim() -> None:
    desk = Desk(num_blocks=8)
    desk.prefill("a", 16, computed=4)
    desk.prefill("b", 16, computed=4)
    desk.wait("c", 4)
    schedule = desk.schedule()
    assert not schedule.preempted
    assert names(schedule.requests) == ["a", "b"]


def test_only_decodes_are_victims_whoever_else_has_blocks() -> None:
    desk = Desk(num_blocks=8)
    desk.decode("first", prompt=4)
    desk.decode("second", prompt=4)
    desk.prefill("third", 12, computed=4)
    desk.receive("fourth", 12)
    assert desk.kv.num_free == 0
    schedule = desk.schedule()
    assert names(schedule.preempted) == ["second"]
    assert names(schedule.requests) == ["first", "third"]


def test_the_table_of_statuses_lets_only_decodes_be_preempted() -> None:
    before = {status for status, after in TRANSITIONS.items() if DecodeStatus.PREEMPTED in after}
    assert before == {DecodeStatus.RUNNING_DECODE}


def test_latest_first_takes_from_the_back() -> None:
    desk = Desk(num_blocks=4, preemption_order="latest_first")
    for name, prompt, output in (("a", 4, 1), ("b", 3, 5), ("c", 4, 1)):
        desk.decode(name, prompt=prompt, output=output)
    assert names(desk.schedule().preempted) == ["c"]


def test_shortest_output_first_takes_who_has_least_to_lose_and_of_equals_the_longest_prompt() -> None:
    """#6606 had this sort inverted."""
    desk = Desk(num_blocks=8, preemption_order="shortest_output_first")
    for name, prompt, output in (("a", 3, 2), ("b", 7, 2), ("c", 4, 9), ("d", 3, 6)):
        desk.decode(name, prompt=prompt, output=output)
    assert desk.kv.num_free == 0
    assert names(desk.scheduler._order(list(desk.scheduler.decoding))) == ["b", "a", "d", "c"]
    assert names(desk.schedule().preempted) == ["b", "a"]


def test_as_many_give_way_as_it_takes_and_no_more() -> None:
    desk = Desk(num_blocks=8)
    for name in "abcd":
        desk.decode(name, prompt=8)  # two blocks each, all need a third
    assert desk.kv.num_free == 0
    # d gives two blocks for a, b, c: one short; c gives two more.
    schedule = desk.schedule()
    assert names(schedule.preempted) == ["d", "c"]
    assert names(schedule.requests) == ["a", "b"]


def test_a_decode_that_needs_no_block_may_be_the_victim_of_one_that_does() -> None:
    desk = Desk(num_blocks=2)
    desk.decode("needy", prompt=4, output=1)
    desk.decode("content", prompt=2, output=1)
    schedule = desk.schedule()
    assert names(schedule.preempted) == ["content"]
    assert names(schedule.requests) == ["needy"]


def test_one_decode_stays_and_sits_out_while_others_hold_what_it_needs() -> None:
    desk = Desk(num_blocks=3)
    waiting = desk.decode("a", prompt=4, output=1)
    coming = desk.receive("b", 8)
    schedule = desk.schedule()
    assert not schedule.chunks
    assert not schedule.preempted
    assert schedule.outgrown is None
    assert waiting in desk.scheduler.decoding
    # As soon as the other decodes it can give way.
    desk.arrive(coming, 8)
    schedule = desk.schedule()
    assert names(schedule.preempted) == ["b"]
    assert names(schedule.requests) == ["a"]


def test_a_decode_that_sits_out_does_not_hold_up_a_running_prefill() -> None:
    desk = Desk(num_blocks=4)
    desk.decode("a", prompt=4, output=1)
    desk.prefill("b", 12, computed=4)
    assert names(desk.schedule().requests) == ["b"]


def test_the_last_decode_that_cannot_grow_has_outgrown_the_pool() -> None:
    desk = Desk(num_blocks=2)
    alone = desk.decode("a", prompt=8, output=1)
    schedule = desk.schedule()
    assert schedule.outgrown is alone
    assert not schedule.chunks
    assert not schedule.preempted


def test_nobody_has_outgrown_a_pool_while_a_request_that_is_over_still_holds_blocks() -> None:
    desk = Desk(num_blocks=3)
    desk.decode("a", prompt=8, output=1)
    closing = desk.kv.allocate(1)
    assert desk.schedule().outgrown is None
    desk.kv.unpin(closing)
    assert names(desk.schedule().requests) == ["a"]


def test_evictable_blocks_are_taken_before_anybody_is_preempted() -> None:
    desk = Desk(num_blocks=6)
    desk.wait("cached", 16, max_tokens=1)
    desk.step()
    assert desk.kv.num_evictable == 4
    for name in "ab":
        desk.decode(name, prompt=4, output=1)
    schedule = desk.schedule()
    assert not schedule.preempted
    assert names(schedule.requests) == ["a", "b"]


# ---------------------------------------------------------------- preemption: what follows


def test_a_step_that_preempted_admits_nobody() -> None:
    desk = Desk(num_blocks=9)
    for name in "ab":
        desk.decode(name, prompt=16, output=1)
    desk.wait("new", 2)
    schedule = desk.schedule()
    assert names(schedule.preempted) == ["b"]
    assert desk.kv.can_allocate(1)
    assert not schedule.admitted


@pytest.mark.parametrize(("requeue", "order"), [("front", ["b", "c", "new"]), ("tail", ["new", "b", "c"])])
def test_victims_go_back_in_the_order_they_came(requeue: str, order: list[str]) -> None:
    desk = Desk(num_blocks=6, requeue=requeue)
    for name in "abc":
        desk.decode(name, prompt=8, output=1)
        desk.now += 1
    desk.wait("new", 4)
    desk.scheduler.reserve = type("Room", (type(desk.scheduler.reserve),), {"room_blocks": lambda self, n: 4})()
    assert names(desk.schedule().preempted) == ["c", "b"]
    assert names(desk.scheduler.waiting) == order


def test_a_victim_gives_all_its_blocks_back_and_they_stay_matchable() -> None:
    desk = Desk(num_blocks=4)
    desk.decode("a", prompt=8, output=1)
    victim = desk.decode("b", prompt=8, output=1)
    desk.schedule()
    assert not victim.block_table
    assert victim.num_computed_tokens == 0
    assert victim.num_preemptions == 1
    assert len(desk.kv.match(victim.hashes)) == 1  # the second was taken by a at once
    desk.kv.check_invariants()


def test_a_resumed_request_computes_what_was_evicted_and_samples_the_token_after_its_newest() -> None:
    desk = Desk(num_blocks=6)
    first = desk.decode("a", prompt=11, output=2, max_tokens=3)
    victim = desk.decode("b", prompt=8, output=5)
    victim_tokens = list(victim.token_ids)
    assert names(desk.step().preempted) == ["b"]
    assert first in desk.finished
    [chunk] = desk.schedule().chunks
    assert chunk.sequence is victim
    assert victim.token_ids == victim_tokens
    assert chunk.samples
    assert chunk.start + chunk.num_tokens == len(victim_tokens)
    assert victim.num_cached_tokens == 0  # what it finds of its own is no prefix hit of the client's


def test_a_single_free_block_does_not_thrash() -> None:
    """A resumed request needs its blocks and the reserve: it does not come back only to be preempted again."""
    desk = Desk(num_blocks=12, reserve_policy="new_token_ratio", watermark=0.0)
    for name in "abcd":
        desk.decode(name, prompt=8, output=1, max_tokens=24)
    desk.run()
    assert desk.scheduler.num_preempted <= 4
    assert sorted(names(desk.finished)) == ["a", "b", "c", "d"]


def test_preemptions_are_told_to_the_policy_with_those_that_stay() -> None:
    desk = Desk(num_blocks=9, block_size=4, reserve_policy="new_token_ratio")
    desk.decode("a", prompt=8, output=1, max_tokens=100)
    desk.decode("b", prompt=8, output=3, max_tokens=200)
    desk.decode("c", prompt=16, output=1, max_tokens=400)
    assert desk.kv.num_free == 0
    desk.scheduler.schedule(desk.now)
    # a and b stay: (1 + 3 + 16 * 4 * 2) / (100 + 200 + 1), less the decay of this step.
    assert desk.scheduler.reserve.level == pytest.approx(132 / 301 - 0.001)


def test_sglang_frees_room_for_retract_decode_steps_of_those_that_stay() -> None:
    desk = Desk(num_blocks=20, reserve_policy="sglang", sglang={"retract_decode_steps": 8})
    for name in "abcde":
        desk.decode(name, prompt=16, output=1)
    # Each victim gives 4 blocks. Three that stay need 1 now and 2 more each: 9 blocks, so a third must go.
    schedule = desk.schedule()
    assert names(schedule.preempted) == ["e", "d", "c"]


# ---------------------------------------------------------------- priorities


PRIORITY: dict[str, Any] = {"enable_priority_scheduling": True}


def test_the_lowest_number_is_admitted_first() -> None:
    desk = Desk(num_blocks=64, max_num_seqs=2, **PRIORITY)
    for name, priority in (("later", 1), ("soon", 0), ("sooner", -1), ("soon too", 0)):
        desk.wait(name, 4, priority=priority)
    assert names(desk.schedule().admitted) == ["sooner", "soon"]


def test_without_priority_scheduling_the_number_means_nothing() -> None:
    desk = Desk(num_blocks=64, max_num_seqs=2)
    for name, priority in (("later", 1), ("soon", 0), ("sooner", -1)):
        desk.wait(name, 4, priority=priority)
    assert names(desk.schedule().admitted) == ["later", "soon"]


def test_waiting_makes_urgent() -> None:
    desk = Desk(num_blocks=64, max_num_seqs=1, priority_aging_s=10.0, **PRIORITY)
    desk.wait("old", 4, priority=1)
    desk.now += 9.9
    desk.wait("new", 4, priority=0)
    assert names(desk.scheduler.waiting.ordered(desk.now)) == ["new", "old"]
    desk = Desk(num_blocks=64, max_num_seqs=1, priority_aging_s=10.0, **PRIORITY)
    desk.wait("old", 4, priority=1)
    desk.now += 10.1
    desk.wait("new", 4, priority=0)
    assert names(desk.schedule().admitted) == ["old"]


def test_an_urgent_prompt_takes_the_blocks_of_a_less_urgent_decode() -> None:
    desk = Desk(num_blocks=6, **PRIORITY)
    desk.decode("keep", prompt=8, output=2, priority=0)
    desk.decode("give", prompt=8, output=2, priority=2)
    desk.wait("urgent", 8, priority=1)
    schedule = desk.step()
    assert names(schedule.preempted) == ["give"]
    assert not schedule.admitted
    assert names(desk.step().admitted) == ["urgent"]


@pytest.mark.parametrize("priority", [2, 3])
def test_an_equally_or_less_urgent_prompt_preempts_nobody(priority: int) -> None:
    desk = Desk(num_blocks=6, **PRIORITY)
    desk.decode("a", prompt=8, output=2, priority=0)
    desk.decode("b", prompt=8, output=2, priority=2)
    desk.wait("new", 8, priority=priority)
    assert not desk.schedule().preempted


def test_without_priority_scheduling_a_prompt_preempts_nobody() -> None:
    desk = Desk(num_blocks=6)
    desk.decode("a", prompt=8, output=2, priority=0)
    desk.decode("b", prompt=8, output=2, priority=5)
    desk.wait("urgent", 8, priority=-5)
    assert not desk.schedule().preempted


def test_nobody_is_preempted_for_a_prompt_that_would_still_not_fit() -> None:
    desk = Desk(num_blocks=6, **PRIORITY)
    desk.decode("a", prompt=8, output=2, priority=0)
    desk.decode("b", prompt=8, output=2, priority=2)
    desk.wait("huge", 24, priority=1)
    assert not desk.schedule().preempted


def test_an_urgent_prompt_leaves_one_decode_and_never_takes_from_a_prefill() -> None:
    desk = Desk(num_blocks=6, **PRIORITY)
    desk.decode("alone", prompt=8, output=2, priority=5)
    desk.prefill("computing", 8, priority=5)
    desk.wait("urgent", 8, priority=0)
    assert not desk.schedule().preempted


def test_the_least_urgent_gives_way_first_when_blocks_run_out() -> None:
    desk = Desk(num_blocks=3, **PRIORITY)
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        desk.decode(name, prompt=4, output=1, priority=priority)
    assert names(desk.schedule().preempted) == ["a", "c"]


def test_an_old_request_is_not_preempted_for_one_that_would_have_to_wait_for_it_anyway() -> None:
    """Who is more urgent is one order for queue and victims: else the two would change places at every step."""
    desk = Desk(num_blocks=6, priority_aging_s=0.1, **PRIORITY)
    desk.decode("older", prompt=8, output=2, priority=0, max_tokens=16)
    desk.decode("old", prompt=8, output=2, priority=1, max_tokens=16)
    desk.now += 60.0
    desk.wait("urgent", 8, priority=0, max_tokens=16)
    desk.run()
    assert desk.scheduler.num_preempted <= 2
    assert len(desk.finished) == 3


@pytest.mark.parametrize("aging_s", [0.01, 1.0, 100.0])
def test_nobody_starves_under_a_stream_of_urgent_prompts(aging_s: float) -> None:
    desk = Desk(num_blocks=8, priority_aging_s=aging_s, max_num_seqs=3, **PRIORITY)
    patient = desk.wait("patient", 8, priority=3, max_tokens=6)
    while patient not in desk.finished:
        desk.wait("urgent", 8, priority=0, max_tokens=4)
        desk.step()
        desk.now += 2.0
    overtook = [request for request in desk.finished if request is not patient]
    # Three levels of priority are worth three times the aging; what comes later than that comes behind it. (Those that
    # ran while it was admitted may finish before it.)
    assert sum(request.arrival_s > patient.arrival_s + 3 * aging_s for request in overtook) <= 3


# ---------------------------------------------------------------- reservations of prefill nodes


def test_reservations_are_refused_while_preempted_requests_wait() -> None:
    desk = Desk(num_blocks=4)
    for name in "ab":
        desk.decode(name, prompt=8, output=1)
    assert desk.scheduler.may_reserve(0, 4, desk.now) is None
    desk.schedule()
    assert desk.scheduler.may_reserve(0, 4, desk.now) == "preempted requests wait for blocks"


def test_an_urgent_reservation_need_not_wait_for_a_less_urgent_preempted_request() -> None:
    desk = Desk(num_blocks=4, **PRIORITY)
    for name in "ab":
        desk.decode(name, prompt=8, output=1, priority=5)
    desk.schedule()
    assert desk.scheduler.may_reserve(5, 4, desk.now) is not None
    assert desk.scheduler.may_reserve(4, 4, desk.now) is None


def test_reservations_count_against_max_num_seqs_with_those_that_wait() -> None:
    desk = Desk(max_num_seqs=3)
    desk.decode("a")
    desk.receive("b", 4)
    assert desk.scheduler.may_reserve(0, 4, desk.now) is None
    desk.wait("c", 4)
    assert desk.scheduler.may_reserve(0, 4, desk.now) == "max_num_seqs (3) requests are here"


def test_reserved_requests_that_cannot_be_preempted_leave_a_running_one_room_to_grow() -> None:
    """What reserved requests may still become counts at the door: the running decode never has to sit out for them."""
    desk = Desk(num_blocks=16, reserve_policy="new_token_ratio", new_token_ratio={"init": 1.0, "decay": 0.0})
    running = desk.decode("running", prompt=4, output=1, max_tokens=25)
    newcomer = desk.request("newcomer", 0, DecodeStatus.RESERVING, max_tokens=8)
    num_reserved = 0
    while desk.scheduler.fits(newcomer, 2, []):
        desk.receive(f"reserved {num_reserved}", 8, max_tokens=8)
        num_reserved += 1
    assert num_reserved == 2
    while running not in desk.finished:
        assert names(desk.step().requests) == ["running"]


# ---------------------------------------------------------------- edges of max_tokens


@pytest.mark.parametrize("max_tokens", [1, 2, 4, 5])
def test_requests_of_few_tokens_take_no_block_for_a_token_that_never_comes(max_tokens: int) -> None:
    desk = Desk(num_blocks=2)
    request = desk.wait("a", 4, max_tokens=max_tokens)
    desk.run()
    assert request.num_output_tokens == max_tokens
    # The last token's KV is never computed: 4 prompt tokens and all output tokens but the last.
    assert len(request.block_table) == -(-(4 + max_tokens - 1) // 4)


def test_a_request_beyond_its_limit_reserves_nothing() -> None:
    """Remaining tokens are never negative."""
    for policy in ("new_token_ratio", "sglang"):
        desk = Desk(reserve_policy=policy)
        over = desk.decode("over", output=9, max_tokens=4)
        assert over.remaining_output_tokens == 0
        assert desk.scheduler.reserved_blocks() == 0


def run_alone(**config: Any) -> list[int]:
    """Return the sizes of the steps of one long prompt beside a decode."""
    desk = Desk(num_blocks=64, **config)
    desk.decode("a", max_tokens=100)
    desk.wait("b", 30, max_tokens=2)
    return [sum(chunk.num_tokens for chunk in desk.step().chunks) for _ in range(6)]


def test_chunked_prefill_shares_its_steps_with_decodes() -> None:
    assert run_alone(max_num_batched_tokens=11) == [11, 11, 11, 2, 1, 1]
    assert run_alone(max_num_batched_tokens=1000) == [31, 2, 1, 1, 1, 1]
