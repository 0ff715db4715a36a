"""When the conversations of a load begin."""

from __future__ import annotations

import math

import numpy as np


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Return ``count`` times in seconds, ascending, at ``rate`` per second: all 0 if it is infinite.

    Gaps follow a gamma distribution of shape ``burstiness``: 1 is a Poisson process, less comes in bursts, more is more
    regular, infinity is equal gaps. As in ``vllm bench serve`` the times are scaled so that the last is
    ``count / rate``: different seeds then have equal mean rates.
    """
    if math.isinf(rate) or count == 0:
        return [0.0] * count
    if math.isinf(burstiness):
        gaps = np.full(count, 1.0 / rate)
    else:
        gaps = np.random.default_rng([seed, 0xA771]).gamma(burstiness, 1.0 / (rate * burstiness), count)
    times = np.cumsum(gaps)
    if times[-1] > 0:
        times *= count / rate / times[-1]
    return [float(time) for time in times]
