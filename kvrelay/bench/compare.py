"""Compares two servers that were measured in rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from kvrelay.bench.metrics import Metrics

COMPARED = (
    "request_throughput",
    "output_throughput",
    "request_goodput",
    *(f"{which}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for which in ("mean", "p50", "p90", "p99")),
)

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % quantiles of Student's t distribution with 1 to 30 degrees of freedom."""

_NORMAL_975 = 1.96


class Ratio(NamedTuple):
    """A figure of the second server over that of the first: geometric mean over rounds, 95 % confidence interval.

    With one round the interval is unknown (nan).
    """

    mean: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval is to one side of 1."""
        return self.low > 1 or self.high < 1


def ratio_of(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return the ratio of paired positive values, by Student's t on the logarithms of the rounds' ratios."""
    logs = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return Ratio(math.exp(mean), math.nan, math.nan)
    t = _T_975[len(logs) - 2] if len(logs) - 1 <= len(_T_975) else _NORMAL_975
    margin = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - margin), math.exp(mean + margin))


def compare(rounds: Sequence[tuple[Metrics, Metrics]]) -> dict[str, Ratio]:
    """Return the ratio of each compared figure that is positive in all rounds on both servers."""
    found = {}
    for name in COMPARED:
        first, second = [a.get(name, 0.0) for a, _ in rounds], [b.get(name, 0.0) for _, b in rounds]
        if min(*first, *second) > 0:
            found[name] = ratio_of(first, second)
    return found
