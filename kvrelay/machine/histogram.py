"""A histogram that only grows, for metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from kvrelay.protocol.messages.base import HistogramReport


class Histogram:
    """Counts of values by bucket, and their sum.

    ``counts[i]`` are the values up to ``bounds[i]`` and above the bound before; the last count is of those above all.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add ``count`` observations of ``value``."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def add_growth(self, before: HistogramReport | None, after: HistogramReport) -> None:
        """Add what ``after`` has more than ``before``, two reports of one histogram with these bounds.

        Reports with other bounds, those of another version, are ignored.
        """
        num_counts = len(self.counts)
        if len(after.counts) != num_counts or (before is not None and len(before.counts) != num_counts):
            return
        known = [0] * num_counts if before is None else before.counts
        self.counts = [own + max(0, new - old) for own, new, old in zip(self.counts, after.counts, known, strict=True)]
        self.total += max(0.0, after.total - (before.total if before is not None else 0.0))

    def report(self, name: str, label: str = "") -> HistogramReport:
        """Return it as it is now, for heartbeats."""
        return HistogramReport(name, label, list(self.counts), self.total)
