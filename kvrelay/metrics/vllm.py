"""vLLM's metrics by their names, labels and buckets, for tools that know vLLM only.

Every family has the labels ``model_name`` and ``engine``. Gateways take one series of a gauge for the whole server, so
there is one.
"""

from __future__ import annotations

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from kvrelay.metrics.buckets import cumulative
from kvrelay.protocol import histograms
from kvrelay.protocol.messages.base import HistogramReport

ENGINE = "0"
"""Value of the label ``engine``."""

REQUEST_BOUNDS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
FIRST_TOKEN_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
TOKEN_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)

_HISTOGRAMS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    histograms.FIRST_TOKEN: ("time_to_first_token", "Arrival to first token.", FIRST_TOKEN_BOUNDS_S),
    histograms.INTER_TOKEN: ("inter_token_latency", "Time between outputs of a request.", TOKEN_BOUNDS_S),
    histograms.PER_OUTPUT_TOKEN: (
        "request_time_per_output_token",
        "Mean time between tokens, per request.",
        TOKEN_BOUNDS_S,
    ),
    histograms.REQUEST: ("e2e_request_latency", "Arrival to last token.", REQUEST_BOUNDS_S),
    histograms.QUEUE: ("request_queue_time", "Arrival at the node until it got KV blocks.", REQUEST_BOUNDS_S),
    histograms.PREFILL: ("request_prefill_time", "Begin of prefill to first token.", REQUEST_BOUNDS_S),
    histograms.DECODE: ("request_decode_time", "Begin of decode to last token.", REQUEST_BOUNDS_S),
    histograms.INFERENCE: ("request_inference_time", "Begin of prefill to last token.", REQUEST_BOUNDS_S),
}
"""Names of nodes' histograms (``kvrelay.protocol.histograms``): vLLM's name without prefix and unit, help, bounds."""

HISTOGRAM_NAMES = tuple(_HISTOGRAMS)

_GAUGES = {
    "num_requests_running": "Requests that are computed.",
    "num_requests_waiting": "Requests that wait.",
    "kv_cache_usage_perc": "Used share of the KV blocks, from 0 to 1.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Prompt tokens looked up in prefix caches.",
    "prefix_cache_hits": "Prompt tokens found in prefix caches.",
    "num_preemptions": "Preemptions.",
}
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
"""Values of the label ``source``."""

FINISHED_REASONS = ("stop", "length", "abort", "error")
"""Values of the label ``finished_reason``."""


class VllmFamilies:
    """Makes families with vLLM's names for a model."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name, "engine": ENGINE}

    def gauge(self, name: str, value: float) -> Metric:
        """Return the gauge ``vllm:NAME``."""
        family = GaugeMetricFamily(f"vllm:{name}", _GAUGES[name], labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def counter(self, name: str, value: float) -> Metric:
        """Return the counter ``vllm:NAME_total``."""
        family = CounterMetricFamily(f"vllm:{name}", _COUNTERS[name], labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def prompt_tokens_by_source(self, computed: float, cached: float, received: float) -> Metric:
        """Return where the KV of prompts came from, in tokens. ``received``: from another node or from the store."""
        return self._counters(
            "prompt_tokens_by_source",
            "Prompt tokens by source.",
            "source",
            dict(zip(SOURCES, (computed, cached, received), strict=True)),
        )

    def request_success(self, by_reason: dict[str, float]) -> Metric:
        """Return the finished requests by reason."""
        values = {reason: by_reason.get(reason, 0.0) for reason in FINISHED_REASONS}
        return self._counters("request_success", "Finished requests by reason.", "finished_reason", values)

    def _counters(self, name: str, help_text: str, label: str, values: dict[str, float]) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", help_text, labels=[*self._labels, label])
        for value, count in values.items():
            family.add_metric([*self._labels.values(), value], count)
        return family

    def cache_config_info(self, block_size: int, num_blocks: int) -> Metric:
        """Return the size of the KV pool. ``num_gpu_blocks`` are its blocks on whatever device it is."""
        facts = {**self._labels, "block_size": str(block_size), "num_gpu_blocks": str(num_blocks)}
        return _info("cache_config_info", "Size of the KV cache, in the labels.", facts, 1.0)

    def lora_requests_info(self, now: float) -> Metric:
        """Return that no LoRA adapter is loaded; gateways count a scrape without this family as failed."""
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        facts = {**self._labels, **dict(zip(names, ("0", "", ""), strict=True))}
        return _info("lora_requests_info", "LoRA adapters, in the labels; the value is the time.", facts, now)

    def histogram(self, report: HistogramReport) -> Metric:
        """Return vLLM's family of a node's histogram. Raises KeyError if vLLM has none (``HISTOGRAM_NAMES``)."""
        name, help_text, bounds = _HISTOGRAMS[report.name]
        family = HistogramMetricFamily(f"vllm:{name}_seconds", help_text, labels=list(self._labels))
        buckets = cumulative(histograms.BOUNDS[report.name], report.counts, bounds)
        family.add_metric(list(self._labels.values()), buckets, report.total)
        return family


def _info(name: str, help_text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(f"vllm:{name}", help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
