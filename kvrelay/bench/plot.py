"""A picture of a benchmark: distributions of latencies, and output over time. Needs matplotlib (``kvrelay[bench]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvrelay.bench.errors import BenchError
from kvrelay.bench.metrics import latencies_s
from kvrelay.bench.streams import RequestRecord

_PANELS = {"ttft": "TTFT, ms", "itl": "ITL, ms", "e2el": "E2E latency, ms"}


def require_matplotlib() -> Any:
    """Return ``matplotlib.pyplot``. Raises BenchError with what to install if there is none."""
    try:
        import matplotlib  # noqa: PLC0415 (an extra)

        matplotlib.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install 'kvrelay[bench]'") from error
    return pyplot


def draw(path: Path, runs: Mapping[str, Sequence[RequestRecord]]) -> None:
    """Write a PNG with a line for each of ``runs``, by label; only requests that succeeded count.

    Raises BenchError without matplotlib or if ``path`` cannot be written.
    """
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, len(_PANELS) + 1, figsize=(16, 3.6), layout="constrained")
    for label, records in runs.items():
        done = [record for record in records if record.error is None]
        values = latencies_s(done)
        for panel, name in zip(axes, _PANELS, strict=False):
            sorted_ms = np.sort(np.asarray(values[name])) * 1000
            panel.plot(sorted_ms, np.arange(1, len(sorted_ms) + 1) / max(1, len(sorted_ms)), label=label)
        seconds, rates = _output_rates(done)
        axes[-1].plot(seconds, rates, label=label)
    for panel, title in zip(axes, _PANELS.values(), strict=False):
        panel.set(xlabel=title, ylabel="share", ylim=(0, 1))
    axes[-1].set(xlabel="time, s", ylabel="output tokens/s", ylim=(0, None))
    for panel in axes:
        panel.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0].legend()
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        raise BenchError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)


def _output_rates(records: Sequence[RequestRecord]) -> tuple[list[int], list[float]]:
    """Return seconds since the first request and the tokens that came in each.

    The tokens of a request are spread evenly over its chunks, because a chunk does not say how many it has.
    """
    if not records:
        return [], []
    begin_s = min(record.start_s for record in records)
    times = [record.start_s - begin_s + at_s for record in records for at_s in record.chunk_times_s]
    weights = [record.output_tokens / len(record.chunk_times_s) for record in records for _ in record.chunk_times_s]
    edges = np.arange(0, int(max(times)) + 2)
    rates, _ = np.histogram(times, bins=edges, weights=weights)
    return [int(edge) for edge in edges[:-1]], [float(rate) for rate in rates]
