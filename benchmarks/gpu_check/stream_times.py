"""What the chunks of streamed answers say of latency: no clock and no I/O. All times are in seconds, of one clock."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Stream(NamedTuple):
    """One answer. ``chunk_s`` and ``num_tokens``: when each chunk with tokens came, and how many it had."""

    sent_s: float
    chunk_s: list[float]
    num_tokens: list[int]

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.chunk_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0 if there is only one."""
        return (self.chunk_s[-1] - self.chunk_s[0]) / max(1, sum(self.num_tokens) - 1)

    def gaps_s(self, begin_s: float, end_s: float) -> Iterator[float]:
        """Yield the time between tokens of chunks between two moments; tokens of one chunk share its time."""
        for index in range(1, len(self.chunk_s)):
            if self.chunk_s[index - 1] >= begin_s and self.chunk_s[index] <= end_s:
                count = self.num_tokens[index]
                yield from [(self.chunk_s[index] - self.chunk_s[index - 1]) / count] * count


class Together(NamedTuple):
    """What happened while all streams decoded: from the last first token to the first last token.

    ``median_s``, ``mean_s``, ``p99_s``: of the time between tokens. ``num_tokens``: of each stream there, median.
    """

    seconds: float
    median_s: float
    mean_s: float
    p99_s: float
    num_tokens: int


def together(streams: Sequence[Stream]) -> Together | None:
    """Return what happened while all ``streams`` decoded, None if they never did."""
    begin_s, end_s = max(one.chunk_s[0] for one in streams), min(one.chunk_s[-1] for one in streams)
    by_stream = [list(one.gaps_s(begin_s, end_s)) for one in streams]
    gaps = sorted(gap for its in by_stream for gap in its)
    if not gaps:
        return None
    count = statistics.median_low(len(its) for its in by_stream)
    p99_s = gaps[len(gaps) * 99 // 100]
    return Together(end_s - begin_s, statistics.median(gaps), statistics.fmean(gaps), p99_s, count)


def tokens_per_s(streams: Sequence[Stream]) -> float:
    """Return output tokens a second, from the first request to the last token."""
    seconds = max(one.chunk_s[-1] for one in streams) - min(one.sent_s for one in streams)
    return sum(sum(one.num_tokens) for one in streams) / seconds


class Prefilled(NamedTuple):
    """Times of one prompt on P. ``moving_s``: while at least one layer was being transferred."""

    prefill_s: float
    moving_s: float
    hidden_s: float
    exposed_s: float


def prefilled(timeline: Mapping[str, Any], node: str = "p0") -> Prefilled:
    """Return the times of a request whose timeline has the transfer by the prefill node called ``node``."""
    marks = marks_of(timeline, node)
    end_s, moving_s, hidden_s, until_s = marks["first_token"], 0.0, 0.0, 0.0
    for sent_s, written_s in sorted((layer["first_sent_s"], layer["last_written_s"]) for layer in timeline["layers"]):
        from_s, until_s = max(sent_s, until_s), max(written_s, until_s)
        moving_s += until_s - from_s
        hidden_s += max(0.0, min(until_s, end_s) - min(from_s, end_s))
    return Prefilled(end_s - marks["prefill"], moving_s, hidden_s, max(0.0, until_s - end_s))


def marks_of(timeline: Mapping[str, Any], node: str) -> dict[str, float]:
    """Return the marks of a request by ``node``, by name."""
    return {mark["name"]: mark["at_s"] for mark in timeline["marks"] if mark["node"] == node}
