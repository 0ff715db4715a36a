"""Buckets of Prometheus histograms from counts of finer ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def cumulative(
    bounds: Sequence[float], counts: Sequence[int], wanted: Sequence[float] | None = None
) -> list[tuple[str, float]]:
    """Return (``le``, count up to it) for each bound in ``wanted``, which ``bounds`` contains, and for infinity.

    ``counts[i]`` are the values up to ``bounds[i]`` and above the bound before; the last is of those above all bounds.
    Without ``wanted``: all ``bounds``. With fewer or more counts than bounds and one, from a node of another version,
    the buckets that both have.
    """
    totals = dict(zip((*bounds, "+Inf"), itertools.accumulate(counts), strict=False))
    return [(str(bound), totals[bound]) for bound in (*(wanted or bounds), "+Inf") if bound in totals]
