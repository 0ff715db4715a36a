"""Finds stop strings in incremental text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopScan(NamedTuple):
    """Text that can be delivered, and the stop string that ended it, if any."""

    text: str
    matched: str | None


class StopStrings:
    """Stop strings with what searching for them needs, which all choices of a request share."""

    __slots__ = ("searches",)

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.searches = [(stop, _failure_table(stop)) for stop in stops]


NO_STOPS = StopStrings()


class StopMatcher:
    """Finds the first completed stop string, and holds back text that may be the start of one.

    Of two that end with the same character the longer one counts. So the result depends on the text alone, not on how
    it was cut into pieces. The search is that of Knuth, Morris and Pratt for each string: constant cost per character.
    """

    def __init__(self, stops: StopStrings, *, include_stop: bool = False) -> None:
        self._stops = stops.searches
        self._progress = [0] * len(self._stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> StopScan:
        """Add text. While not ``armed``, complete stop strings are ignored."""
        if not self._stops:
            return StopScan(text, None)
        for offset, char in enumerate(text):
            matched = self._advance(char)
            if matched is not None and armed:
                return self._cut(self._held + text[: offset + 1], matched)
        pending = self._held + text
        shown = len(pending) - max(self._progress)
        self._held = pending[shown:]
        return StopScan(pending[:shown], None)

    def flush(self) -> str:
        """Return the text that was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Advance every search by ``char``; return the longest completed stop string."""
        matched = None
        for index, (stop, failure) in enumerate(self._stops):
            state = self._progress[index]
            while state == len(stop) or (state and stop[state] != char):
                state = failure[state - 1]
            state += stop[state] == char
            self._progress[index] = state
            if state == len(stop) and (matched is None or len(stop) > len(matched)):
                matched = stop
        return matched

    def _cut(self, text: str, matched: str) -> StopScan:
        self._held = ""
        return StopScan(text if self._include_stop else text[: -len(matched)], matched)


def _failure_table(pattern: str) -> list[int]:
    """Return for each prefix of ``pattern`` the length of its longest proper suffix that is a prefix too."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        length += pattern[index] == pattern[length]
        table[index] = length
    return table
