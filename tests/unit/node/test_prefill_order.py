"""Who goes first: by length, by how far a prompt has been overtaken, by priority."""

from __future__ import annotations

import pytest

from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.node.prefill_order import PrefillOrder, ShortestFirst, prefill_order

NOW = 100.0


def make(order: str = "shortest_first", overtake: int = 100, step: int = 20, **config: object) -> PrefillOrder[str]:
    settings = {"prefill_order": order, "prefill_overtake_tokens": overtake, "max_num_batched_tokens": step, **config}
    return prefill_order(SchedulerConfig(**settings))  # type: ignore[arg-type]


def arrive(order: PrefillOrder[str], priority: int = 0, now: float = NOW, **lengths: int) -> None:
    for name, length in lengths.items():
        order.arrived(name, priority, length, now)


def run(order: PrefillOrder[str], **lengths: int) -> None:
    """Let requests that are queued be ready to compute so many tokens."""
    for name, length in lengths.items():
        order.admitted(name, length)
        order.ready(name, length)


@pytest.mark.parametrize(("order", "expected"), [("fifo", "abc"), ("shortest_first", "bca")])
def test_the_order_of_running_and_queued_prompts(order: str, expected: str) -> None:
    made = make(order)
    arrive(made, a=50, b=10, c=20)
    assert "".join(made.queued("abc", NOW)) == expected
    run(made, a=50, b=10, c=20)
    assert "".join(made.running("abc", NOW)) == expected


def test_the_first_of_equals_is_the_oldest() -> None:
    made = make()
    arrive(made, b=10, a=10)
    assert made.queued("ab", NOW) == ["b", "a"]


@pytest.mark.parametrize(("order", "expected"), [("fifo", "abc"), ("shortest_first", "cab")])
def test_running_and_waiting_prompts_in_one_order(order: str, expected: str) -> None:
    made = make(order)
    arrive(made, a=30, b=40, c=5)
    run(made, a=30)
    assert "".join(made.merged("a", "bc", NOW)) == expected


def test_a_prompt_that_has_begun_gives_way_to_much_shorter_ones_only() -> None:
    made = make(overtake=10_000)
    arrive(made, begun=100)
    run(made, begun=100)
    made.computing([("begun", 20)], NOW)  # 80 are left, so it counts as 40
    arrive(made, half=40, shorter=39)
    assert made.merged(["begun"], ["half", "shorter"], NOW) == ["shorter", "begun", "half"]
    always: ShortestFirst[str] = ShortestFirst(SchedulerConfig(), begun_weight=1.0)
    always.arrived("begun", 0, 100, NOW)
    always.admitted("begun", 100)
    always.computing([("begun", 20)], NOW)
    always.arrived("half", 0, 40, NOW)
    assert always.merged(["begun"], ["half"], NOW) == ["half", "begun"]


def test_being_overtaken_makes_a_prompt_count_as_shorter() -> None:
    made = make(overtake=120, step=20)  # within 100 tokens the length falls to nothing
    arrive(made, long=100, short=60)
    run(made, long=100, short=60)
    assert made.running(["long", "short"], NOW) == ["short", "long"]
    made.computing([("short", 20)], NOW)
    arrive(made, other=70)
    run(made, other=70)
    assert made.running(["long", "other"], NOW) == ["other", "long"]  # 100 * 0.8
    made.computing([("other", 20)], NOW)
    arrive(made, third=61)
    assert made.merged(["long"], ["third"], NOW) == ["long", "third"]  # 100 * 0.6


def test_a_prompt_is_not_charged_with_older_ones_nor_with_what_it_does_itself() -> None:
    made = make(overtake=30, step=10)
    arrive(made, old=100, new=20)
    run(made, old=100, new=20)
    for _ in range(5):
        made.computing([("old", 10)], NOW)
    assert made.running(["old", "new"], NOW) == ["new", "old"]


def test_a_budget_of_one_step_or_less_is_the_order_of_arrival() -> None:
    made = make(overtake=20, step=20)
    arrive(made, a=50, b=10)
    assert made.queued(["a", "b"], NOW) == ["a", "b"]


def test_blocks_are_given_ahead_of_older_prompts_only_as_far_as_these_may_be_overtaken() -> None:
    made = make(overtake=100)
    arrive(made, long=500, a=60, b=40, c=1)
    assert [name for name in ("long", "a", "b", "c") if made.may_overtake(name)] == ["long", "a", "b", "c"]
    made.admitted("a", 60)
    assert made.may_overtake("b")
    made.admitted("b", 40)
    assert not made.may_overtake("c")
    made.admitted("long", 500)
    assert made.may_overtake("c")


def test_what_others_compute_for_requests_that_get_blocks_here_counts_too() -> None:
    made = make("fifo", overtake=100)
    assert made.may_be_passed(0, 1000)  # nobody waits
    arrive(made, waits=10)
    assert made.may_be_passed(0, 100)
    assert not made.may_be_passed(0, 101)
    assert made.may_be_passed(-1, 101)  # more urgent
    made.passed(0, 60)
    assert not made.may_be_passed(0, 41)
    assert made.may_be_passed(0, 40)
    made.left("waits")
    assert made.may_be_passed(0, 1000)


def test_prompts_get_blocks_when_they_are_two_steps_away() -> None:
    made = make(overtake=10_000, step=20)
    arrive(made, a=30, b=31, long=300, short=5)
    run(made, a=30)
    assert made.begins_soon("b", NOW)
    run(made, b=31)
    assert not made.begins_soon("long", NOW)
    assert made.begins_soon("short", NOW)
    fifo = make("fifo")
    arrive(fifo, a=1000, b=1000)
    run(fifo, a=1000)
    assert fifo.begins_soon("b", NOW)


@pytest.mark.parametrize("order", ["fifo", "shortest_first"])
def test_priorities_come_before_length(order: str) -> None:
    for by_priority, expected in ((True, ["urgent", "short"]), (False, None)):
        made = make(order, enable_priority_scheduling=by_priority)
        arrive(made, short=1, priority=1)
        arrive(made, urgent=100, priority=0)
        assert made.queued(["short", "urgent"], NOW) == (expected or ["short", "urgent"])
        run(made, short=1, urgent=100)
        assert made.running(["short", "urgent"], NOW) == (expected or ["short", "urgent"])


def test_waiting_raises_by_whole_levels_and_length_decides_within_one() -> None:
    made = make(enable_priority_scheduling=True, priority_aging_s=10.0)
    arrive(made, priority=1, now=NOW, old=30)
    arrive(made, priority=0, now=NOW + 9.0, new=40)
    for waited_s, expected in ((9.5, ["new", "old"]), (10.0, ["old", "new"]), (19.0, ["new", "old"])):
        assert made.queued(["old", "new"], NOW + waited_s) == expected


def test_more_urgent_prompts_are_not_held_against_others() -> None:
    made = make(enable_priority_scheduling=True, overtake=100, step=20)
    arrive(made, priority=1, patient=50)
    arrive(made, priority=0, urgent=1000)
    arrive(made, priority=1, later=90)
    run(made, urgent=1000)
    for _ in range(10):
        made.computing([("urgent", 20)], NOW)
    assert made.may_overtake("later")


def test_nobody_waits_for_a_block_that_a_less_urgent_one_computes() -> None:
    for by_priority in (True, False):
        made = make(enable_priority_scheduling=by_priority)
        arrive(made, priority=1, computes=100)
        arrive(made, priority=0, urgent=10)
        arrive(made, priority=1, equal=10)
        run(made, computes=100)
        assert made.may_wait_for_a_block("urgent") is not by_priority
        assert made.may_wait_for_a_block("equal")


def test_who_returns_goes_first_and_is_held_against_nobody() -> None:
    made = make(overtake=40, step=20)
    arrive(made, waits=5)
    made.returned("victim", 0, 1000, NOW - 5.0, to_front=True)
    made.returned("second", 0, 10, NOW - 4.0, to_front=True)
    assert made.queued(["victim", "second", "waits"], NOW) == ["victim", "second", "waits"]
    run(made, victim=1000)
    made.computing([("victim", 20)], NOW)
    arrive(made, later=35)
    assert made.may_overtake("later")
    made.left("victim")
    made.returned("victim", 0, 1000, NOW - 5.0, to_front=False)
    assert made.queued(["second", "waits", "later", "victim"], NOW) == ["second", "waits", "later", "victim"]


def test_a_prompt_that_is_read_from_the_store_is_not_being_overtaken() -> None:
    made = make(overtake=100, step=20)
    arrive(made, loads=500, short=20)
    made.admitted("loads", 500)
    run(made, short=20)
    made.computing([("short", 20)], NOW)
    made.ready("loads", 90)
    arrive(made, other=85)
    assert made.merged(["loads"], ["other"], NOW) == ["other", "loads"]


def test_waits_are_counted_by_length_when_the_first_chunk_is_computed() -> None:
    made = make()
    arrive(made, short=10, long=5000)
    assert made.longest_wait_s(NOW + 2.0) == 2.0
    assert made.tokens_by_length() == [10, 0, 0, 5000, 0]
    made.computing([("short", 10)], NOW + 0.05)
    made.computing([("long", 20)], NOW + 4.0)
    made.computing([("long", 20)], NOW + 5.0)
    assert made.longest_wait_s(NOW + 9.0) == 0.0
    short, _, _, long, _ = made.waits.report()
    assert short.counts == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0] and short.total_s == pytest.approx(0.05)
    assert (sum(long.counts), long.total_s) == (1, 4.0)
    assert made.tokens_by_length() == [0, 0, 0, 4960, 0]
    for name in ("short", "long", "unknown"):
        made.left(name)
    assert len(made) == 0
