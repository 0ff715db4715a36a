"""A node's own metrics in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvrelay.metrics.nodes import NodeLoad, node_families
from kvrelay.metrics.vllm import HISTOGRAM_NAMES, VllmFamilies
from kvrelay.protocol import histograms
from kvrelay.protocol.messages.base import HistogramReport, Load
from kvrelay.protocol.messages.node_to_router import Register


class NodeMetrics(Collector):
    """The load of one node under kvrelay's names and vLLM's. ``load`` returns it, ``now`` the time in seconds."""

    def __init__(self, registration: Register, load: Callable[[], Load], now: Callable[[], float]) -> None:
        self._registration = registration
        self._load = load
        self._now = now
        self._families = VllmFamilies(registration.model)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def exposition(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the families are known when they are collected."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        load, me = self._load(), self._registration
        yield from node_families([NodeLoad(me.node_id, me.role, load)])
        yield from self._gauges(load)
        yield from self._counters(load)
        reports = {report.name: report for report in load.histograms}
        for name in HISTOGRAM_NAMES:
            nothing = HistogramReport(name, "", [0] * (len(histograms.BOUNDS[name]) + 1), 0.0)
            yield self._families.histogram(reports.get(name, nothing))

    def _gauges(self, load: Load) -> Iterator[Metric]:
        families, me = self._families, self._registration
        yield families.gauge("num_requests_running", load.num_running)
        yield families.gauge("num_requests_waiting", load.num_waiting)
        yield families.gauge("kv_cache_usage_perc", load.used_blocks / me.num_blocks)
        yield families.cache_config_info(me.geometry.block_size, me.num_blocks)
        yield families.lora_requests_info(self._now())

    def _counters(self, load: Load) -> Iterator[Metric]:
        families, counters = self._families, load.counters
        computed, cached, stored, received = (
            counters.get(f"prompt_tokens_{source}", 0.0) for source in ("computed", "cached", "stored", "received")
        )
        yield families.counter("prompt_tokens", computed + cached + stored + received)
        yield families.prompt_tokens_by_source(computed, cached, stored + received)
        yield families.counter(
            "generation_tokens", counters.get("decode_tokens", 0.0) + counters.get("first_tokens", 0.0)
        )
        yield families.counter("prefix_cache_queries", counters.get("prefix_query_tokens", 0.0))
        yield families.counter("prefix_cache_hits", counters.get("prefix_hit_tokens", 0.0))
        yield families.counter("num_preemptions", counters.get("preemptions", 0.0))
        reasons = ("stop", "length")
        yield families.request_success({reason: counters.get(f"finished_{reason}", 0.0) for reason in reasons})
