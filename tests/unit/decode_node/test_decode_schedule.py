"""The scheduler of decode and mixed nodes, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest
from support.scheduling import Desk, names

from decode_node.request import TRANSITIONS, DecodeStatus

# ---------------------------------------------------------------- order and budget


def test_decodes_come_first_then_running_prefills_then_newcomers() -> None:
    harness = Desk(max_num_batched_tokens=20, prefill_order="fifo")
    harness.wait("new", 8)
    harness.prefill("chunked", 12, computed=4)
    harness.decode("a")
    harness.decode("b")
    schedule = harness.schedule()
    assert names(schedule.requests) == ["a", "b", "chunked", "new"]
    assert [chunk.num_tokens for chunk in schedule.chunks] == [1, 1, 8, 8]
    assert [chunk.start for chunk in schedule.chunks] == [4, 4, 4, 0]
    assert [chunk.samples for chunk in schedule.chunks] == [True] * 4
    assert names(schedule.admitted) == ["new"]


def test_a_step_never_computes_more_than_the_budget() -> None:
    harness = Desk(num_blocks=64, max_num_batched_tokens=10, prefill_order="fifo")
    harness.prefill("chunked", 30, computed=20)
    harness.decode("a")
    harness.wait("new", 8)
    schedule = harness.schedule()
    assert [chunk.num_tokens for chunk in schedule.chunks] == [1, 9]
    assert [chunk.samples for chunk in schedule.chunks] == [True, False]
    assert not schedule.admitted


def test_a_newcomer_that_is_much_shorter_goes_before_a_prompt_that_has_begun() -> None:
    harness = Desk(num_blocks=64, max_num_batched_tokens=10)
    harness.prefill("chunked", 40, computed=20)
    harness.decode("a")
    harness.wait("long", 30)
    harness.wait("new", 8)
    schedule = harness.schedule()
    assert names(schedule.requests) == ["a", "new", "chunked"]
    assert [chunk.num_tokens for chunk in schedule.chunks] == [1, 8, 1]
    assert names(schedule.admitted) == ["new"]


def test_what_is_in_the_prefix_cache_does_not_count_as_length() -> None:
    harness = Desk(num_blocks=64, max_num_batched_tokens=100)
    history = harness.tokens(48)
    harness.wait("first", history, max_tokens=1)
    harness.run()
    harness.wait("other", 20)
    harness.wait("follow-up", [*history, *harness.tokens(6)])
    assert names(harness.schedule().requests) == ["follow-up", "other"]


def test_what_is_published_while_a_prompt_waits_makes_it_shorter() -> None:
    harness = Desk(num_blocks=64, max_num_batched_tokens=16, max_num_seqs=1)
    common = harness.tokens(16)
    harness.wait("computes", common)
    harness.wait("other", 18)
    harness.wait("shares", [*common, *harness.tokens(5)])
    assert names(harness.requests.waiting.ordered(harness.now)) == ["computes", "other", "shares"]
    harness.step()
    assert names(harness.requests.waiting.ordered(harness.now)) == ["shares", "other"]


def test_a_prompt_whose_next_block_is_being_computed_comes_after_others() -> None:
    harness = Desk(num_blocks=64, max_num_batched_tokens=8)
    common = harness.tokens(32)
    harness.wait("computes", common)
    harness.step()
    harness.wait("shares", [*common[:12], *harness.tokens(1)])
    harness.wait("longer", 6)
    schedule = harness.step()  # what "shares" lacks is computed from here on
    assert names(schedule.admitted) == ["longer"]
    harness.step()
    assert names(harness.step().admitted) == ["shares"]


def test_a_reservation_is_refused_while_a_prompt_waits_that_has_been_overtaken_enough() -> None:
    harness = Desk(num_blocks=8, prefill_overtake_tokens=20)
    harness.decode("a", prompt=16)
    harness.wait("long", 28)
    harness.schedule()
    assert harness.scheduler.admission.may_reserve(0, 12, harness.now) is None
    harness.requests.order.passed(0, 12)
    assert harness.scheduler.admission.may_reserve(0, 12, harness.now) == "prompts that came earlier wait for blocks"
    assert harness.scheduler.admission.may_reserve(0, 8, harness.now) is None


def test_what_is_left_of_the_budget_goes_to_the_next_prompt() -> None:
    harness = Desk(num_blocks=64, max_num_batched_tokens=10)
    for name in "xyz":
        harness.wait(name, 6)
    schedule = harness.schedule()
    assert [chunk.num_tokens for chunk in schedule.chunks] == [6, 4]
    assert names(harness.requests.waiting) == ["z"]


def test_more_decodes_than_the_budget_take_turns() -> None:
    harness = Desk(num_blocks=64, max_num_batched_tokens=3)
    requests = [harness.decode(str(number)) for number in range(7)]
    for _ in range(7):
        assert sum(chunk.num_tokens for chunk in harness.step().chunks) == 3
    assert [request.num_output_tokens for request in requests] == [1 + 3] * 7


def test_max_num_seqs_counts_everybody_who_has_blocks() -> None:
    harness = Desk(max_num_seqs=4)
    harness.decode("a")
    harness.prefill("b", 8, computed=4)
    harness.receive("c", 8)
    harness.wait("d", 4)
    harness.wait("e", 4)
    assert names(harness.schedule().admitted) == ["d"]


def test_a_running_prefill_that_gets_no_budget_stops_newcomers_and_no_decode() -> None:
    harness = Desk(max_num_batched_tokens=2)
    harness.prefill("chunked", 12)
    harness.decode("a")
    harness.decode("b")
    harness.wait("new", 4)
    schedule = harness.schedule()
    assert names(schedule.requests) == ["a", "b"]
    assert not schedule.admitted


def test_first_come_first_served_even_if_the_second_would_fit() -> None:
    for order, admitted in (("fifo", []), ("shortest_first", ["small"])):
        harness = Desk(num_blocks=8, prefill_order=order)
        harness.decode("a", prompt=12)
        harness.wait("large", 24)
        harness.wait("small", 4)
        assert names(harness.schedule().admitted) == admitted


def test_a_newcomer_begins_behind_its_prefix_hit() -> None:
    harness = Desk(num_blocks=16)
    prompt = harness.tokens(10)
    harness.wait("first", prompt, max_tokens=1)
    harness.step()
    harness.wait("again", prompt)
    schedule = harness.schedule()
    assert [(chunk.start, chunk.num_tokens) for chunk in schedule.chunks] == [(8, 2)]
    assert schedule.requests[0].num_cached_tokens == 8


def test_a_prompt_wholly_in_cache_computes_its_last_token_only() -> None:
    harness = Desk(num_blocks=16)
    prompt = harness.tokens(8)
    harness.wait("first", prompt, max_tokens=1)
    harness.step()
    harness.wait("again", prompt)
    [chunk] = harness.schedule().chunks
    assert (chunk.start, chunk.num_tokens, chunk.samples) == (7, 1, True)


def test_prompts_that_come_together_share_what_they_begin_with() -> None:
    harness = Desk(num_blocks=32)
    common = harness.tokens(16)
    for name in "abc":
        harness.wait(name, common + harness.tokens(3))
    assert names(harness.step().admitted) == ["a"]
    schedule = harness.step()
    assert names(schedule.admitted) == ["b", "c"]
    assert [chunk.num_tokens for chunk in schedule.chunks] == [1, 3, 3]


def test_an_empty_schedule_is_no_step() -> None:
    schedule = Desk().schedule()
    assert not schedule.chunks
    assert not schedule.preempted
    assert schedule.exceeds_pool is None


# ---------------------------------------------------------------- the reserve at the door


def test_the_reserve_keeps_newcomers_out_but_not_decodes_in_need() -> None:
    harness = Desk(num_blocks=12, reserve_policy="fixed_blocks", fixed_blocks={"blocks": 8})
    grown = harness.decode("a", prompt=4, output=1)
    harness.wait("new", 16)
    schedule = harness.schedule()
    assert names(schedule.requests) == ["a"]
    assert len(grown.block_table) == 2  # its second block came out of the reserve


def test_the_reserve_counts_running_prefills_and_reserved_requests_too() -> None:
    for kind in ("decode", "prefill", "receive"):
        harness = Desk(num_blocks=12, reserve_policy="fixed_blocks", fixed_blocks={"blocks": 3})
        getattr(harness, kind)("a", 4)
        assert harness.scheduler.admission.headroom_blocks() == 3


def test_a_running_prefill_goes_on_whatever_the_reserve() -> None:
    harness = Desk(num_blocks=8, reserve_policy="fixed_blocks", fixed_blocks={"blocks": 100})
    harness.prefill("a", 20, computed=8)
    harness.decode("b")
    assert names(harness.schedule().requests) == ["b", "a"]


@pytest.mark.parametrize("policy", ["new_token_ratio", "fixed_blocks", "sglang"])
def test_the_reserve_never_leaves_a_node_idle(policy: str) -> None:
    harness = Desk(num_blocks=8, reserve_policy=policy, fixed_blocks={"blocks": 1000}, watermark=0.9)
    harness.wait("a", 28, max_tokens=4)
    assert names(harness.schedule().admitted) == ["a"]


@pytest.mark.parametrize(
    ("policy", "admitted"), [("none", ["b"]), ("new_token_ratio", []), ("fixed_blocks", []), ("sglang", [])]
)
def test_each_policy_decides_at_the_door(policy: str, admitted: list[str]) -> None:
    harness = Desk(num_blocks=10, reserve_policy=policy)
    harness.decode("a", max_tokens=40)
    harness.wait("b", 8, max_tokens=40)
    assert names(harness.schedule().admitted) == admitted


def test_sglang_charges_a_newcomer_its_own_output_at_the_door() -> None:
    """Whoever runs reserves next to nothing here: it is the newcomer's 40 tokens that do not fit."""
    for clip, admitted in ((40, []), (4, ["b"])):
        sglang = {"init": 0.01, "clip_max_new_tokens": clip}
        harness = Desk(num_blocks=12, reserve_policy="sglang", sglang=sglang)
        harness.decode("a", max_tokens=40)
        harness.wait("b", 8, max_tokens=40)
        assert names(harness.schedule().admitted) == admitted


def test_the_watermark_stays_free_when_one_is_admitted() -> None:
    for watermark, admitted in ((0.0, ["b"]), (0.5, [])):
        harness = Desk(num_blocks=10, watermark=watermark)
        harness.decode("a", prompt=12)
        harness.wait("b", 8)
        assert names(harness.schedule().admitted) == admitted


def test_the_level_falls_only_with_steps_that_schedule_something_and_comes_back_when_idle() -> None:
    harness = Desk(reserve_policy="new_token_ratio", new_token_ratio={"decay": 0.1})

    def level() -> float:
        return harness.scheduler.reserve.level

    request = harness.receive("a", 4, max_tokens=3)
    harness.decode("b", max_tokens=2)
    harness.step()
    assert level() == pytest.approx(0.6)
    for _ in range(3):
        harness.step()
    assert level() == pytest.approx(0.6)  # nothing was scheduled, and it is not idle: a reservation is held
    harness.arrive(request, 4)
    harness.step()
    assert level() == pytest.approx(0.5)
    harness.step()
    assert request in harness.finished
    assert level() == pytest.approx(0.4)
    harness.step()
    assert level() == 0.7


# ---------------------------------------------------------------- preemption: who


def full(harness: Desk) -> int:
    """Take every free block away from the harness; return how many."""
    free = harness.kv.num_free
    harness.kv.allocate(free)
    return free


def test_all_running_are_prefills_so_there_is_no_victim() -> None:
    harness = Desk(num_blocks=8)
    harness.prefill("a", 16, computed=4)
    harness.prefill("b", 16, computed=4)
    harness.wait("c", 4)
    schedule = harness.schedule()
    assert not schedule.preempted
    assert names(schedule.requests) == ["a", "b"]


def test_only_decodes_are_victims_whoever_else_has_blocks() -> None:
    harness = Desk(num_blocks=8)
    harness.decode("first", prompt=4)
    harness.decode("second", prompt=4)
    harness.prefill("third", 12, computed=4)
    harness.receive("fourth", 12)
    assert harness.kv.num_free == 0
    schedule = harness.schedule()
    assert names(schedule.preempted) == ["second"]
    assert names(schedule.requests) == ["first", "third"]


def test_the_table_of_statuses_lets_only_decodes_be_preempted() -> None:
    before = {status for status, after in TRANSITIONS.items() if DecodeStatus.PREEMPTED in after}
    assert before == {DecodeStatus.RUNNING_DECODE}


def test_latest_first_takes_from_the_back() -> None:
    harness = Desk(num_blocks=4, preemption_order="latest_first")
    for name, prompt, output in (("a", 4, 1), ("b", 3, 5), ("c", 4, 1)):
        harness.decode(name, prompt=prompt, output=output)
    assert names(harness.schedule().preempted) == ["c"]


def test_shortest_output_first_takes_who_has_least_to_lose_and_of_equals_the_longest_prompt() -> None:
    """#6606 had this sort inverted."""
    harness = Desk(num_blocks=8, preemption_order="shortest_output_first")
    for name, prompt, output in (("a", 3, 2), ("b", 7, 2), ("c", 4, 9), ("d", 3, 6)):
        harness.decode(name, prompt=prompt, output=output)
    assert harness.kv.num_free == 0
    assert names(harness.scheduler.preemption._order(list(harness.requests.decoding))) == ["b", "a", "d", "c"]
    assert names(harness.schedule().preempted) == ["b", "a"]


def test_as_many_give_way_as_it_takes_and_no_more() -> None:
    harness = Desk(num_blocks=8)
    for name in "abcd":
        harness.decode(name, prompt=8)  # two blocks each, all need a third
    assert harness.kv.num_free == 0
    # d gives two blocks for a, b, c: one short; c gives two more.
    schedule = harness.schedule()
    assert names(schedule.preempted) == ["d", "c"]
    assert names(schedule.requests) == ["a", "b"]


def test_a_decode_that_needs_no_block_may_be_the_victim_of_one_that_does() -> None:
    harness = Desk(num_blocks=2)
    harness.decode("needy", prompt=4, output=1)
    harness.decode("content", prompt=2, output=1)
    schedule = harness.schedule()
    assert names(schedule.preempted) == ["content"]
    assert names(schedule.requests) == ["needy"]


def test_one_decode_stays_and_sits_out_while_others_hold_what_it_needs() -> None:
    harness = Desk(num_blocks=3)
    waiting = harness.decode("a", prompt=4, output=1)
    coming = harness.receive("b", 8)
    schedule = harness.schedule()
    assert not schedule.chunks
    assert not schedule.preempted
    assert schedule.exceeds_pool is None
    assert waiting in harness.requests.decoding
    # As soon as the other decodes it can give way.
    harness.arrive(coming, 8)
    schedule = harness.schedule()
    assert names(schedule.preempted) == ["b"]
    assert names(schedule.requests) == ["a"]


def test_a_decode_that_sits_out_does_not_hold_up_a_running_prefill() -> None:
    harness = Desk(num_blocks=4)
    harness.decode("a", prompt=4, output=1)
    harness.prefill("b", 12, computed=4)
    assert names(harness.schedule().requests) == ["b"]


def test_the_last_decode_that_cannot_grow_has_outgrown_the_pool() -> None:
    harness = Desk(num_blocks=2)
    alone = harness.decode("a", prompt=8, output=1)
    schedule = harness.schedule()
    assert schedule.exceeds_pool is alone
    assert not schedule.chunks
    assert not schedule.preempted


def test_nobody_has_outgrown_a_pool_while_a_request_that_is_over_still_holds_blocks() -> None:
    harness = Desk(num_blocks=3)
    harness.decode("a", prompt=8, output=1)
    closing = harness.kv.allocate(1)
    assert harness.schedule().exceeds_pool is None
    harness.kv.unpin(closing)
    assert names(harness.schedule().requests) == ["a"]


def test_evictable_blocks_are_taken_before_anybody_is_preempted() -> None:
    harness = Desk(num_blocks=6)
    harness.wait("cached", 16, max_tokens=1)
    harness.step()
    assert harness.kv.num_evictable == 4
    for name in "ab":
        harness.decode(name, prompt=4, output=1)
    schedule = harness.schedule()
    assert not schedule.preempted
    assert names(schedule.requests) == ["a", "b"]


# ---------------------------------------------------------------- preemption: what follows


def test_a_step_that_preempted_admits_nobody() -> None:
    harness = Desk(num_blocks=9)
    for name in "ab":
        harness.decode(name, prompt=16, output=1)
    harness.wait("new", 2)
    schedule = harness.schedule()
    assert names(schedule.preempted) == ["b"]
    assert harness.kv.can_allocate(1)
    assert not schedule.admitted


@pytest.mark.parametrize(("requeue", "order"), [("front", ["b", "c", "new"]), ("tail", ["new", "b", "c"])])
def test_victims_go_back_in_the_order_they_came(
    requeue: str, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Desk(num_blocks=6, requeue=requeue)
    for name in "abc":
        harness.decode(name, prompt=8, output=1)
        harness.now += 1
    harness.wait("new", 4)
    monkeypatch.setattr(harness.scheduler.reserve, "room_blocks", lambda num_decodes: 4)
    assert names(harness.schedule().preempted) == ["c", "b"]
    assert names(harness.requests.waiting) == order


def test_a_victim_gives_all_its_blocks_back_and_they_stay_matchable() -> None:
    harness = Desk(num_blocks=4)
    harness.decode("a", prompt=8, output=1)
    victim = harness.decode("b", prompt=8, output=1)
    harness.schedule()
    assert not victim.block_table
    assert victim.num_computed_tokens == 0
    assert victim.num_preemptions == 1
    assert len(harness.kv.match(victim.hashes)) == 1  # the second was taken by a at once
    harness.kv.check_invariants()


def test_a_resumed_request_computes_what_was_evicted_and_samples_the_token_after_its_newest() -> None:
    harness = Desk(num_blocks=6)
    first = harness.decode("a", prompt=11, output=2, max_tokens=3)
    victim = harness.decode("b", prompt=8, output=5)
    victim_tokens = list(victim.token_ids)
    assert names(harness.step().preempted) == ["b"]
    assert first in harness.finished
    schedule = harness.schedule()
    [chunk] = schedule.chunks
    assert schedule.requests == [victim]
    assert victim.token_ids == victim_tokens
    assert chunk.samples
    assert chunk.end == len(victim_tokens)
    assert victim.num_cached_tokens == 0  # what it finds of its own is no prefix hit of the client's


def test_a_single_free_block_does_not_thrash() -> None:
    """A resumed request needs its blocks and the reserve: it does not come back only to be preempted again."""
    harness = Desk(num_blocks=12, reserve_policy="new_token_ratio", watermark=0.0)
    for name in "abcd":
        harness.decode(name, prompt=8, output=1, max_tokens=24)
    harness.run()
    assert harness.num_preempted <= 4
    assert sorted(names(harness.finished)) == ["a", "b", "c", "d"]


def test_preemptions_are_told_to_the_policy_with_those_that_stay() -> None:
    harness = Desk(num_blocks=9, block_size=4, reserve_policy="new_token_ratio")
    harness.decode("a", prompt=8, output=1, max_tokens=100)
    harness.decode("b", prompt=8, output=3, max_tokens=200)
    harness.decode("c", prompt=16, output=1, max_tokens=400)
    assert harness.kv.num_free == 0
    harness.scheduler.schedule(harness.now)
    # a and b stay: (1 + 3 + 16 * 4 * 2) / (100 + 200 + 1), less the decay of this step.
    assert harness.scheduler.reserve.level == pytest.approx(132 / 301 - 0.001)


def test_sglang_frees_room_for_retract_decode_steps_of_those_that_stay() -> None:
    harness = Desk(num_blocks=20, reserve_policy="sglang", sglang={"retract_decode_steps": 8})
    for name in "abcde":
        harness.decode(name, prompt=16, output=1)
    # Each victim gives 4 blocks. Three that stay need 1 now and 2 more each: 9 blocks, so a third must go.
    schedule = harness.schedule()
    assert names(schedule.preempted) == ["e", "d", "c"]


# ---------------------------------------------------------------- priorities


PRIORITY: dict[str, Any] = {"enable_priority_scheduling": True}


def test_the_lowest_number_is_admitted_first() -> None:
    harness = Desk(num_blocks=64, max_num_seqs=2, **PRIORITY)
    for name, priority in (("later", 1), ("soon", 0), ("sooner", -1), ("soon too", 0)):
        harness.wait(name, 4, priority=priority)
    assert names(harness.schedule().admitted) == ["sooner", "soon"]


def test_without_priority_scheduling_the_number_means_nothing() -> None:
    harness = Desk(num_blocks=64, max_num_seqs=2)
    for name, priority in (("later", 1), ("soon", 0), ("sooner", -1)):
        harness.wait(name, 4, priority=priority)
    assert names(harness.schedule().admitted) == ["later", "soon"]


def test_waiting_makes_urgent() -> None:
    harness = Desk(num_blocks=64, max_num_seqs=1, priority_aging_s=10.0, **PRIORITY)
    harness.wait("old", 4, priority=1)
    harness.now += 9.9
    harness.wait("new", 4, priority=0)
    assert names(harness.requests.waiting.ordered(harness.now)) == ["new", "old"]
    harness = Desk(num_blocks=64, max_num_seqs=1, priority_aging_s=10.0, **PRIORITY)
    harness.wait("old", 4, priority=1)
    harness.now += 10.1
    harness.wait("new", 4, priority=0)
    assert names(harness.schedule().admitted) == ["old"]


def test_an_urgent_prompt_takes_the_blocks_of_a_less_urgent_decode() -> None:
    harness = Desk(num_blocks=6, **PRIORITY)
    harness.decode("keep", prompt=8, output=2, priority=0)
    harness.decode("give", prompt=8, output=2, priority=2)
    harness.wait("urgent", 8, priority=1)
    schedule = harness.step()
    assert names(schedule.preempted) == ["give"]
    assert not schedule.admitted
    assert names(harness.step().admitted) == ["urgent"]


@pytest.mark.parametrize("priority", [2, 3])
def test_an_equally_or_less_urgent_prompt_preempts_nobody(priority: int) -> None:
    harness = Desk(num_blocks=6, **PRIORITY)
    harness.decode("a", prompt=8, output=2, priority=0)
    harness.decode("b", prompt=8, output=2, priority=2)
    harness.wait("new", 8, priority=priority)
    assert not harness.schedule().preempted


def test_without_priority_scheduling_a_prompt_preempts_nobody() -> None:
    harness = Desk(num_blocks=6)
    harness.decode("a", prompt=8, output=2, priority=0)
    harness.decode("b", prompt=8, output=2, priority=5)
    harness.wait("urgent", 8, priority=-5)
    assert not harness.schedule().preempted


def test_nobody_is_preempted_for_a_prompt_that_would_still_not_fit() -> None:
    harness = Desk(num_blocks=6, **PRIORITY)
    harness.decode("a", prompt=8, output=2, priority=0)
    harness.decode("b", prompt=8, output=2, priority=2)
    harness.wait("huge", 24, priority=1)
    assert not harness.schedule().preempted


def test_an_urgent_prompt_leaves_one_decode_and_never_takes_from_a_prefill() -> None:
    harness = Desk(num_blocks=6, **PRIORITY)
    harness.decode("alone", prompt=8, output=2, priority=5)
    harness.prefill("computing", 8, priority=5)
    harness.wait("urgent", 8, priority=0)
    assert not harness.schedule().preempted


def test_the_least_urgent_gives_way_first_when_blocks_run_out() -> None:
    harness = Desk(num_blocks=3, **PRIORITY)
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        harness.decode(name, prompt=4, output=1, priority=priority)
    assert names(harness.schedule().preempted) == ["a", "c"]


def test_an_old_request_is_not_preempted_for_one_that_would_have_to_wait_for_it_anyway() -> None:
    """Who is more urgent is one order for queue and victims: else the two would change places at every step."""
    harness = Desk(num_blocks=6, priority_aging_s=0.1, **PRIORITY)
    harness.decode("older", prompt=8, output=2, priority=0, max_tokens=16)
    harness.decode("old", prompt=8, output=2, priority=1, max_tokens=16)
    harness.now += 60.0
    harness.wait("urgent", 8, priority=0, max_tokens=16)
    harness.run()
    assert harness.num_preempted <= 2
    assert len(harness.finished) == 3


@pytest.mark.parametrize("aging_s", [0.01, 1.0, 100.0])
def test_nobody_starves_under_a_stream_of_urgent_prompts(aging_s: float) -> None:
    harness = Desk(num_blocks=8, priority_aging_s=aging_s, max_num_seqs=3, **PRIORITY)
    patient = harness.wait("patient", 8, priority=3, max_tokens=6)
    while patient not in harness.finished:
        harness.wait("urgent", 8, priority=0, max_tokens=4)
        harness.step()
        harness.now += 2.0
    overtook = [request for request in harness.finished if request is not patient]
    # Three levels of priority are worth three times the aging; what comes later than that comes behind it. (Those that
    # ran while it was admitted may finish before it.)
    assert sum(request.arrival_s > patient.arrival_s + 3 * aging_s for request in overtook) <= 3


# ---------------------------------------------------------------- reservations of prefill nodes


def test_reservations_are_refused_while_preempted_requests_wait() -> None:
    harness = Desk(num_blocks=4)
    for name in "ab":
        harness.decode(name, prompt=8, output=1)
    assert harness.scheduler.admission.may_reserve(0, 4, harness.now) is None
    harness.schedule()
    assert harness.scheduler.admission.may_reserve(0, 4, harness.now) == "preempted requests wait for blocks"


def test_an_urgent_reservation_need_not_wait_for_a_less_urgent_preempted_request() -> None:
    harness = Desk(num_blocks=4, **PRIORITY)
    for name in "ab":
        harness.decode(name, prompt=8, output=1, priority=5)
    harness.schedule()
    assert harness.scheduler.admission.may_reserve(5, 4, harness.now) is not None
    assert harness.scheduler.admission.may_reserve(4, 4, harness.now) is None


def test_reservations_count_against_max_num_seqs_with_those_that_wait() -> None:
    harness = Desk(max_num_seqs=3)
    harness.decode("a")
    harness.receive("b", 4)
    assert harness.scheduler.admission.may_reserve(0, 4, harness.now) is None
    harness.wait("c", 4)
    assert harness.scheduler.admission.may_reserve(0, 4, harness.now) == "max_num_seqs (3) requests are here"


def test_reserved_requests_that_cannot_be_preempted_leave_a_running_one_room_to_grow() -> None:
    """What reserved requests may still become counts at the door: the running decode never has to sit out for them."""
    harness = Desk(num_blocks=16, reserve_policy="new_token_ratio", new_token_ratio={"init": 1.0, "decay": 0.0})
    running = harness.decode("running", prompt=4, output=1, max_tokens=25)
    newcomer = harness.request("newcomer", 0, DecodeStatus.RESERVING, max_tokens=8)
    num_reserved = 0
    while harness.scheduler.admission.fits(newcomer, 2, []):
        harness.receive(f"reserved {num_reserved}", 8, max_tokens=8)
        num_reserved += 1
    assert num_reserved == 2
    while running not in harness.finished:
        assert names(harness.step().requests) == ["running"]


# ---------------------------------------------------------------- edges of max_tokens


@pytest.mark.parametrize("max_tokens", [1, 2, 4, 5])
def test_requests_of_few_tokens_take_no_block_for_a_token_that_never_comes(max_tokens: int) -> None:
    harness = Desk(num_blocks=2)
    request = harness.wait("a", 4, max_tokens=max_tokens)
    harness.run()
    assert request.num_output_tokens == max_tokens
    # The last token's KV is never computed: 4 prompt tokens and all output tokens but the last.
    assert len(request.block_table) == -(-(4 + max_tokens - 1) // 4)


def test_a_request_beyond_its_limit_reserves_nothing() -> None:
    """Remaining tokens are never negative."""
    for policy in ("new_token_ratio", "sglang"):
        harness = Desk(reserve_policy=policy)
        over = harness.decode("over", output=9, max_tokens=4)
        assert over.remaining_output_tokens == 0
        assert harness.scheduler.admission.headroom_blocks() == 0


def run_alone(**config: Any) -> list[int]:
    """Return the sizes of the steps of one long prompt beside a decode."""
    harness = Desk(num_blocks=64, **config)
    harness.decode("a", max_tokens=100)
    harness.wait("b", 30, max_tokens=2)
    return [sum(chunk.num_tokens for chunk in harness.step().chunks) for _ in range(6)]


def test_chunked_prefill_shares_its_steps_with_decodes() -> None:
    assert run_alone(max_num_batched_tokens=11) == [11, 11, 11, 2, 1, 1]
    assert run_alone(max_num_batched_tokens=1000) == [31, 2, 1, 1, 1, 1]
