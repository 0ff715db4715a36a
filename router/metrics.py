"""Prometheus metrics: client-side latencies, tokens, requests, and the load of every node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvrelay.config.cluster_config import Role
from kvrelay.machine.histogram import Histogram
from kvrelay.metrics.buckets import cumulative
from kvrelay.metrics.nodes import NodeLoad, node_families, words
from kvrelay.metrics.vllm import VllmFamilies
from kvrelay.protocol import histograms
from router.client_metrics import ClientMetrics
from router.machine import RouterMachine
from router.node_table import Node
from router.request import Status

_SHORT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_LONG_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)


class Metrics(ClientMetrics):
    """All metrics of one router. ``clock`` returns the time in seconds."""

    def __init__(self, machine: RouterMachine, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.registry = CollectorRegistry()
        self.registry.register(_ClientCollector(self))
        self.registry.register(_MachineCollector(machine))
        self.registry.register(_VllmCollector(self, machine))

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _NoDescriptions(Collector):
    """Collectors whose families are known when they are collected."""

    def describe(self) -> Iterable[Metric]:
        """Return nothing."""
        return ()


class _ClientCollector(_NoDescriptions):
    """What clients got and waited for, under kvrelay's names."""

    def __init__(self, metrics: ClientMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield counters of choices and tokens, and histograms of latencies."""
        metrics = self._metrics
        answered = CounterMetricFamily(
            "kvrelay_requests", "Choices answered, by API and outcome.", labels=["api", "outcome"]
        )
        for labels, count in metrics.requests.items():
            answered.add_metric(labels, count)
        yield answered
        yield CounterMetricFamily("kvrelay_prompt_tokens", "Tokens of prompts.", metrics.prompt_tokens)
        yield CounterMetricFamily(
            "kvrelay_cached_prompt_tokens", "Tokens of prompts no node had to compute.", metrics.cached_tokens
        )
        yield CounterMetricFamily("kvrelay_output_tokens", "Tokens generated.", metrics.output_tokens)
        yield _histogram("kvrelay_ttft_seconds", "Arrival to first token.", metrics.ttft, _LONG_S)
        yield _histogram("kvrelay_itl_seconds", "Each gap between chunks of a stream.", metrics.itl, _SHORT_S)
        yield _histogram("kvrelay_tpot_seconds", "Mean gap between tokens, per choice.", metrics.tpot, _SHORT_S)
        yield _histogram("kvrelay_e2e_seconds", "Arrival to last token.", metrics.e2e, _LONG_S)


class _MachineCollector(_NoDescriptions):
    """Reads the machine at each scrape: counters, requests, nodes and their last reported load."""

    def __init__(self, machine: RouterMachine) -> None:
        self._machine = machine

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics of the machine."""
        for name, value in self._machine.counters.items():
            yield CounterMetricFamily(f"kvrelay_router_{name}", words(name), value)
        by_status = GaugeMetricFamily("kvrelay_requests_in_progress", "Requests, by status.", labels=["status"])
        for status, count in self._machine.requests.by_status.items():
            by_status.add_metric([status], count)
        yield by_status
        errors = HistogramMetricFamily(
            "kvrelay_ttft_prediction_error_seconds",
            "How much earlier or later than predicted first tokens came.",
            labels=["direction"],
        )
        for direction, histogram in self._machine.requests.prediction_errors.items():
            errors.add_metric([direction], cumulative(histogram.bounds, histogram.counts, _LONG_S), histogram.total)
        yield errors
        yield from node_families(
            NodeLoad(node.node_id, node.role.value, node.load) for node in self._machine.node_table
        )


class _VllmCollector(_NoDescriptions):
    """The cluster as one vLLM server."""

    def __init__(self, metrics: ClientMetrics, machine: RouterMachine) -> None:
        self._metrics = metrics
        self._machine = machine
        self._families = VllmFamilies(machine.node_table.model)

    def collect(self) -> Iterator[Metric]:
        """Yield vLLM's families. What this router counts is exact; what nodes count is as of their last heartbeats."""
        families, metrics = self._families, self._metrics
        totals = self._machine.node_table.totals
        yield from self._gauges()
        yield families.counter("prompt_tokens", metrics.prompt_tokens)
        yield families.counter("generation_tokens", metrics.output_tokens)
        yield families.prompt_tokens_by_source(
            metrics.prompt_tokens - metrics.cached_tokens, metrics.cached_tokens, 0.0
        )
        yield families.counter("prefix_cache_queries", metrics.prompt_tokens)
        yield families.counter("prefix_cache_hits", metrics.cached_tokens)
        yield families.counter("num_preemptions", totals.preemptions)
        yield families.request_success(dict(metrics.finished))
        by_name: Mapping[str, Histogram] = {
            histograms.FIRST_TOKEN: metrics.ttft,
            histograms.INTER_TOKEN: metrics.itl,
            histograms.PER_OUTPUT_TOKEN: metrics.tpot,
            histograms.REQUEST: metrics.e2e,
            histograms.INFERENCE: self._machine.requests.timelines.inference,
            **totals.stages,
        }
        for name, histogram in by_name.items():
            yield families.histogram(histogram.report(name))

    def _gauges(self) -> Iterator[Metric]:
        """Yield requests, and the KV cache of the nodes that decode: what a request needs room in until it ends."""
        families, nodes = self._families, list(self._machine.node_table)
        by_status = self._machine.requests.by_status
        num_requests = sum(by_status.values())
        num_undispatched = by_status[Status.WAITING] + by_status[Status.SEEKING_DECODE]
        num_waiting = min(num_requests, num_undispatched + sum(node.load.num_waiting for node in nodes))
        yield families.gauge("num_requests_running", num_requests - num_waiting)
        yield families.gauge("num_requests_waiting", num_waiting)
        decoding = [node for node in nodes if node.role is not Role.PREFILL] or nodes
        num_blocks = sum(node.registration.num_blocks for node in decoding)
        num_used = sum(node.load.used_blocks for node in decoding)
        yield families.gauge("kv_cache_usage_perc", num_used / num_blocks if num_blocks else 0.0)
        yield families.cache_config_info(_block_size(decoding), num_blocks)
        yield families.lora_requests_info(self._metrics.clock())


def _block_size(nodes: Sequence[Node]) -> int:
    """Return the block size of all nodes, 0 without any."""
    return nodes[0].block_size if nodes else 0


def _histogram(name: str, help_text: str, histogram: Histogram, bounds: Sequence[float]) -> Metric:
    family = HistogramMetricFamily(name, help_text)
    family.add_metric([], cumulative(histogram.bounds, histogram.counts, bounds), histogram.total)
    return family
