"""Figures of a run, under the names and with the definitions of ``vllm bench serve``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvrelay.bench.errors import BenchError
from kvrelay.bench.runner import Run
from kvrelay.bench.streams import RequestRecord

PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")
SLOS = ("ttft", "tpot", "e2el")

Metrics = dict[str, float]


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Return the limits in milliseconds of ``ttft:500 tpot:50``. Raises BenchError."""
    limits = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, _, limit = text.partition(":")
        name = "e2el" if name == "e2e" else name
        try:
            limits[name] = float(limit)
        except ValueError:
            limits[name] = -1.0
        if name not in SLOS or limits[name] <= 0:
            raise BenchError(f"--goodput {text}: should be NAME:MILLISECONDS, with NAME one of {', '.join(SLOS)}")
    return limits


def latencies_s(records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """Return all values of each latency, of requests that succeeded, in seconds."""
    return {
        "ttft": [record.ttft_s for record in records],
        "tpot": [record.tpot_s for record in records if record.tpot_s is not None],
        "itl": [gap for record in records for gap in record.itls_s],
        "e2el": [record.e2e_s for record in records],
    }


def measure(run: Run, goodput_ms: Mapping[str, float]) -> Metrics:
    """Return the figures of ``run``; latencies in milliseconds, rates per second.

    ``request_goodput``: requests per second that met every limit of ``goodput_ms``. TPOT of a request with one token
    counts as 0 there.
    """
    done = [record for record in run.records if record.error is None]
    num_input, num_output = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    found: Metrics = {
        "completed": len(done),
        "failed": len(run.records) - len(done),
        "duration": run.duration_s,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / run.duration_s,
        "output_throughput": num_output / run.duration_s,
        "total_token_throughput": (num_input + num_output) / run.duration_s,
        "max_concurrent_requests": _most_at_once(done),
    }
    if goodput_ms:
        num_good = sum(_is_good(record, goodput_ms) for record in done)
        found["request_goodput"] = num_good / run.duration_s
        found["slo_attainment"] = num_good / max(1, len(run.records))
    for name, values in latencies_s(done).items():
        found |= statistics_ms(name, values)
    return found


def statistics_ms(name: str, values_s: Sequence[float]) -> Metrics:
    """Return mean, standard deviation and percentiles of ``values_s``, in milliseconds; nothing if there are none."""
    if not values_s:
        return {}
    values = np.asarray(values_s) * 1000
    percentiles = np.percentile(values, PERCENTILES)
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"std_{name}_ms": float(values.std()),
        f"median_{name}_ms": float(np.median(values)),
        **{f"p{which}_{name}_ms": float(value) for which, value in zip(PERCENTILES, percentiles, strict=True)},
    }


def _is_good(record: RequestRecord, goodput_ms: Mapping[str, float]) -> bool:
    values = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.e2e_s}
    return all(values[name] * 1000 <= limit for name, limit in goodput_ms.items())


def _most_at_once(records: Sequence[RequestRecord]) -> int:
    changes = sorted(
        [(record.start_s, 1) for record in records] + [(record.start_s + record.e2e_s, -1) for record in records]
    )
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0
