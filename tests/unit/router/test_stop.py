from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from router.text.stop import StopMatcher, StopStrings

SMALL = st.text("ab\n", max_size=24)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def cut_up(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[left:right] for left, right in itertools.pairwise(edges)]


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(text=SMALL, stops=STOPS, cuts=st.lists(st.integers(0, 100), max_size=8), include=st.booleans())
def test_pieces_give_what_a_search_in_the_whole_text_gives(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(StopStrings(stops), include_stop=include)
    shown, matched = "", None
    for piece in cut_up(text, cuts):
        scan = matcher.push(piece)
        shown, matched = shown + scan.text, scan.matched
        if matched is not None:
            break
    assert (shown + matcher.flush(), matched) == naive(text, stops, include)


def test_text_is_held_only_while_a_stop_may_be_forming() -> None:
    matcher = StopMatcher(StopStrings(["<end>"]))
    assert matcher.push("a<e") == ("a", None)
    assert matcher.push("nd ") == ("<end ", None)
    assert matcher.push("<en") == ("", None)
    assert matcher.push("d>tail") == ("", "<end>")


def test_stop_overlapping_itself_is_found() -> None:
    matcher = StopMatcher(StopStrings(["aab"]))
    assert [matcher.push(char) for char in "aaab"] == [("", None), ("", None), ("a", None), ("", "aab")]


def test_unarmed_stop_is_passed_over_but_one_that_ends_later_counts() -> None:
    matcher = StopMatcher(StopStrings(["xy"]))
    assert matcher.push("xyx", armed=False).matched is None
    scan = matcher.push("y")
    assert scan == ("", "xy")


def test_no_stops_hold_nothing() -> None:
    assert StopMatcher(StopStrings([])).push("anything") == ("anything", None)
