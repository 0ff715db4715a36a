from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from support.ids import block_ids

from cache_messager.block_mask import all_within, mask_of, runs_of

POSITIONS = st.sets(st.integers(0, 200))


@given(POSITIONS)
def test_runs_are_the_set_in_order_and_never_touch(positions: set[int]) -> None:
    mask = sum(1 << position for position in positions)
    runs = runs_of(mask)
    assert [position for first, count in runs for position in range(first, first + count)] == sorted(positions)
    assert all(first + count < following for (first, count), (following, _) in pairwise(runs))


@given(st.integers(0, 100), st.integers(0, 100))
def test_mask_of_a_range_is_one_run(first: int, count: int) -> None:
    assert runs_of(mask_of(first, count)) == ([(first, count)] if count else [])


def test_all_within_refuses_negative_and_too_large_ids() -> None:
    assert all_within([], 0)
    assert all_within(block_ids(0, 3), 4)
    assert not all_within(block_ids(0, 4), 4)
    assert not all_within(block_ids(-1, 0), 4)
