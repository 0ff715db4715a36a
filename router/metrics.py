"""Prometheus metrics: client-side latencies, tokens, requests, and the load of every node."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvrelay.protocol.messages.base import WAIT_BOUNDS_S
from kvrelay.protocol.prompt_lengths import LENGTH_NAMES
from router.machine import RouterMachine
from router.openai.choice import Choice

_SHORT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_LONG_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_]")


class Metrics:
    """All metrics of one router. ``clock`` returns the time in seconds."""

    def __init__(self, machine: RouterMachine, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kvrelay_requests", "Choices answered, by API and outcome.", ["api", "outcome"], registry=self.registry
        )
        self.prompt_tokens = self._counter("kvrelay_prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("kvrelay_cached_prompt_tokens", "Tokens of prompts no node had to compute.")
        self.output_tokens = self._counter("kvrelay_output_tokens", "Tokens generated.")
        self.ttft = self._histogram("kvrelay_ttft_seconds", "Arrival to first token.", _LONG_S)
        self.itl = self._histogram("kvrelay_itl_seconds", "Each gap between tokens.", _SHORT_S)
        self.tpot = self._histogram("kvrelay_tpot_seconds", "Mean gap between tokens, per choice.", _SHORT_S)
        self.e2e = self._histogram("kvrelay_e2e_seconds", "Arrival to last token.", _LONG_S)
        self.registry.register(_MachineCollector(machine))

    def observer(self, api: str, arrival_s: float) -> RequestObserver:
        """Return the observer of an HTTP request that arrived at ``arrival_s``."""
        return RequestObserver(self, api, arrival_s, self._clock)

    def refused(self, api: str, code: str) -> None:
        """Count an HTTP request answered with an error before any choice was submitted."""
        self.requests.labels(api, code).inc()

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self.registry)


class RequestObserver:
    """Records the latencies of one HTTP request's choices."""

    def __init__(self, metrics: Metrics, api: str, arrival_s: float, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._api = api
        self._arrival_s = arrival_s
        self._clock = clock
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}

    def tokens(self, choice: Choice, num_tokens: int) -> None:
        """Record ``num_tokens`` tokens of ``choice`` delivered together."""
        now = self._clock()
        self._metrics.output_tokens.inc(num_tokens)
        if choice.index in self._last_s:
            self._metrics.itl.observe(now - self._last_s[choice.index])
        else:
            self._first_s[choice.index] = now
            self._metrics.ttft.observe(now - self._arrival_s)
            self._metrics.prompt_tokens.inc(choice.num_prompt_tokens)
            self._metrics.cached_tokens.inc(choice.num_cached_tokens)
        self._last_s[choice.index] = now

    def ended(self, choice: Choice, outcome: str) -> None:
        """Record the end of ``choice``. ``outcome``: ``ok``, ``aborted``, or an error code."""
        self._metrics.requests.labels(self._api, outcome).inc()
        if outcome != "ok":
            return
        now = self._clock()
        self._metrics.e2e.observe(now - self._arrival_s)
        if choice.num_tokens > 1:
            self._metrics.tpot.observe((now - self._first_s[choice.index]) / (choice.num_tokens - 1))


class _MachineCollector(Collector):
    """Reads the machine at each scrape: counters, requests, nodes and their last reported load."""

    def __init__(self, machine: RouterMachine) -> None:
        self._machine = machine

    def describe(self) -> Iterable[Metric]:
        """Return nothing, because the metrics depend on the nodes."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics of the machine."""
        for name, value in self._machine.counters.items():
            yield CounterMetricFamily(f"kvrelay_router_{name}", _words(name), value)
        by_status = GaugeMetricFamily("kvrelay_requests_in_progress", "Requests, by status.", labels=["status"])
        for status, count in self._machine.requests.by_status.items():
            by_status.add_metric([status], count)
        yield by_status
        yield from self._nodes()

    def _nodes(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("kvrelay_node_up", "Registered nodes.", labels=["node", "role"])
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for node in self._machine.node_table:
            labels = [node.node_id, node.role.value]
            up.add_metric(labels, 1)
            load = node.load_as_dict()
            counters, gauges = load.pop("counters"), load.pop("gauges")
            del load["prompt_tokens"], load["prompt_waits"]
            for kind, values in ((GaugeMetricFamily, {**load, **gauges}), (CounterMetricFamily, counters)):
                for name, value in values.items():
                    metric = f"kvrelay_node_{_NOT_A_NAME.sub('_', name)}"
                    family = families.setdefault(metric, kind(metric, _words(name), labels=["node", "role"]))
                    family.add_metric(labels, value)
        yield up
        yield from families.values()
        yield from self._prompts()

    def _prompts(self) -> Iterator[Metric]:
        """Yield the nodes' prompt metrics by prompt length."""
        labels = ["node", "role", "prompt_tokens"]
        tokens = GaugeMetricFamily(
            "kvrelay_node_queued_prompt_tokens", "Prompt tokens still to compute.", labels=labels
        )
        waits = HistogramMetricFamily(
            "kvrelay_node_prompt_wait_seconds", "Arrival at the node to first computed token.", labels=labels
        )
        for node in self._machine.node_table:
            for name, value in zip(LENGTH_NAMES, node.load.prompt_tokens, strict=False):
                tokens.add_metric([node.node_id, node.role.value, name], value)
            for name, wait in zip(LENGTH_NAMES, node.load.prompt_waits, strict=False):
                totals = itertools.accumulate(wait.counts)
                buckets = [(str(bound), total) for bound, total in zip((*WAIT_BOUNDS_S, "+Inf"), totals, strict=False)]
                waits.add_metric([node.node_id, node.role.value, name], buckets, wait.total_s)
        yield tokens
        yield waits


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize() + "."
