"""``prefill_schedule``: first come, first served, the whole budget, chunks that end with blocks."""

from __future__ import annotations

import pytest
from support.machines import spec

from kvrelay.node.plans import Chunk
from prefill_node.request import PrefillRequest
from prefill_node.schedule import prefill_schedule

Sizes = list[tuple[str, int, int, bool]]


def request(name: str, prompt: int, computed: int = 0) -> PrefillRequest:
    made = PrefillRequest(spec(name, prompt), None, [], 0.0)
    made.num_computed_tokens = computed
    return made


def schedule(requests: list[PrefillRequest], budget: int, block_size: int = 4) -> Sizes:
    """Return (name, start, tokens, samples) of each chunk."""
    batch = prefill_schedule(requests, budget, block_size)
    return [(made.spec.request_id, chunk.start, chunk.num_tokens, chunk.samples) for made, chunk in batch]


def test_several_prompts_share_a_step_when_they_fit() -> None:
    requests = [request("a", 5), request("b", 7), request("c", 4)]
    assert schedule(requests, 16) == [("a", 0, 5, True), ("b", 0, 7, True), ("c", 0, 4, True)]


def test_first_come_first_served_with_the_whole_budget() -> None:
    requests = [request("long", 100), request("short", 1)]
    assert schedule(requests, 16) == [("long", 0, 16, False)]


def test_what_a_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    assert schedule([request("a", 6), request("b", 40)], 16) == [("a", 0, 6, True), ("b", 0, 8, False)]


def test_only_the_last_of_a_step_is_cut() -> None:
    requests = [request("a", 10), request("b", 10), request("c", 1)]
    assert schedule(requests, 16) == [("a", 0, 10, True), ("b", 0, 4, False)]


def test_a_rest_of_the_budget_smaller_than_a_block_is_left_alone() -> None:
    assert schedule([request("a", 14), request("b", 40)], 16) == [("a", 0, 14, True)]


@pytest.mark.parametrize("budget", [4, 5, 7, 8, 13, 64])
@pytest.mark.parametrize("computed", [0, 4, 8])
def test_a_cut_chunk_ends_with_a_block(budget: int, computed: int) -> None:
    [(_, start, tokens, samples)] = schedule([request("a", 70, computed)], budget)
    assert start == computed
    assert samples or (start + tokens) % 4 == 0
    assert tokens <= budget
    assert tokens > budget - 4 or samples


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_budget_smaller_than_a_block_is_used_as_it_is(budget: int) -> None:
    assert schedule([request("a", 10)], budget) == [("a", 0, budget, False)]
    # and is aligned as soon as it can be
    assert schedule([request("a", 10, 4 - budget)], budget) == [("a", 4 - budget, budget, False)]


def test_a_chunk_that_began_within_a_block_is_brought_to_a_blocks_end() -> None:
    assert schedule([request("a", 30, 3)], 8) == [("a", 3, 5, False)]


def test_a_prompt_that_is_wholly_cached_computes_its_last_token() -> None:
    assert schedule([request("a", 8, 8)], 16) == [("a", 7, 1, True)]


def test_nobody_runs_nothing_is_scheduled() -> None:
    assert schedule([], 16) == []


def test_every_prompt_is_computed_once_from_end_to_end() -> None:
    for budget in range(1, 30):
        for block_size in (1, 4, 16):
            requests = [request(str(length), length) for length in (1, 3, 16, 33, 7)]
            computed: dict[str, list[Chunk]] = {}
            while requests:
                batch = prefill_schedule(requests, budget, block_size)
                assert 0 < sum(chunk.num_tokens for _, chunk in batch) <= budget
                for made, chunk in batch:
                    computed.setdefault(made.spec.request_id, []).append(chunk)
                    made.num_computed_tokens += chunk.num_tokens
                requests = [made for made in requests if made.num_computed_tokens < made.num_tokens]
            for name, chunks in computed.items():
                assert sum(chunk.num_tokens for chunk in chunks) == int(name)
                assert [chunk.samples for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
