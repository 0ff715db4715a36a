"""The result of a benchmark as tables for the terminal and as data for a JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from kvrelay.bench.compare import Ratio
from kvrelay.bench.metrics import LATENCIES, Metrics
from kvrelay.bench.runner import Run
from kvrelay.protocol.phases import NAMES

_TITLES = {
    "completed": "requests completed",
    "failed": "requests failed",
    "duration": "duration, s",
    "total_input_tokens": "input tokens",
    "total_output_tokens": "output tokens",
    "request_throughput": "requests/s",
    "request_goodput": "goodput, requests/s within all SLOs",
    "slo_attainment": "share of requests within all SLOs",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "input and output tokens/s",
    "max_concurrent_requests": "most requests at once",
}
_NUM_ERRORS = 5


def totals_table(metrics: Metrics) -> Table:
    """Return a table of counts and rates."""
    table = Table("", "", box=None, show_header=False, pad_edge=False)
    table.columns[1].justify = "right"
    for name, title in _TITLES.items():
        if name in metrics:
            value = metrics[name]
            table.add_row(title, f"{value:,.0f}" if value == int(value) else f"{value:,.2f}")
    return table


def latencies_table(metrics: Metrics, names: Sequence[str] = LATENCIES, title: str = "latency, ms") -> Table:
    """Return a table of mean and percentiles, a line for each of ``names`` that was measured."""
    table = Table(title, "mean", "P50", "P90", "P99", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in names:
        if f"mean_{name}_ms" in metrics:
            values = [metrics[f"{which}_{name}_ms"] for which in ("mean", "p50", "p90", "p99")]
            table.add_row(_name(name), *(f"{value:,.2f}" for value in values))
    return table


def phases_table(metrics: Metrics) -> Table:
    """Return a table of the phases of requests in a kvrelay cluster."""
    table = latencies_table(metrics, NAMES, "phase, ms")
    if "hidden_share" in metrics:
        table.caption = f"{100 * metrics['hidden_share']:.0f} % of the transfer time was hidden by prefill"
    return table


def ratios_table(ratios: Mapping[str, Ratio]) -> Table:
    """Return a table of the second server's figures relative to the first's."""
    table = Table("second / first", "ratio", "95 % interval", "", box=None, header_style="bold", pad_edge=False)
    for name, ratio in ratios.items():
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}" if ratio.low == ratio.low else "unknown: one round"
        table.add_row(_name(name), f"{ratio.mean:.3f}", interval, "*" if ratio.is_significant else "")
    table.caption = "*: the interval does not contain 1"
    return table


def errors(run: Run) -> list[str]:
    """Return the most frequent errors, one line each."""
    counts = Counter(record.error for record in run.records if record.error is not None)
    return [f"{count} times: {error}" for error, count in counts.most_common(_NUM_ERRORS)]


def as_data(run: Run, metrics: Metrics, phases: Metrics) -> dict[str, Any]:
    """Return a run for the JSON file: figures, and the values of each request, times in seconds."""
    done = [record for record in run.records if record.error is None]
    return {
        **metrics,
        "phases": phases,
        "input_lens": [record.prompt_tokens for record in done],
        "output_lens": [record.output_tokens for record in done],
        "start_times": [record.start_s for record in done],
        "ttfts": [record.ttft_s for record in done],
        "itls": [record.itls_s for record in done],
        "errors": [record.error for record in run.records if record.error is not None],
    }


def _name(name: str) -> str:
    """Return the title of a figure: ``mean_e2el_ms`` is ``mean E2E``."""
    words = name.removesuffix("_ms").split("_")
    known = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E", "p50": "P50", "p90": "P90", "p99": "P99"}
    return " ".join(known.get(word, word) for word in words)
