"""Families of nodes' loads under kvrelay's names, labelled by node and role."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from kvrelay.metrics.buckets import cumulative
from kvrelay.protocol import histograms
from kvrelay.protocol.messages.base import WAIT_BOUNDS_S, HistogramReport, Load
from kvrelay.protocol.prompt_lengths import LENGTH_NAMES

_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_]")
_NODE = ("node", "role")
_NOT_SCALARS = ("gauges", "counters", "histograms", "prompt_tokens", "prompt_waits", "link_bytes_per_s")


class NodeLoad(NamedTuple):
    """A node and its last load."""

    node: str
    role: str
    load: Load

    @property
    def labels(self) -> list[str]:
        """The values of the labels ``node`` and ``role``."""
        return [self.node, self.role]


def node_families(nodes: Iterable[NodeLoad]) -> Iterator[Metric]:
    """Yield the families of all ``nodes``: whether they are up, gauges, counters, histograms."""
    nodes = list(nodes)
    up = GaugeMetricFamily("kvrelay_node_up", "Registered nodes.", labels=_NODE)
    families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
    for node in nodes:
        up.add_metric(node.labels, 1)
        for kind, values in ((GaugeMetricFamily, gauges(node.load)), (CounterMetricFamily, node.load.counters)):
            for name, value in values.items():
                metric = _metric_name(name)
                family = families.setdefault(metric, kind(metric, words(name), labels=_NODE))
                family.add_metric(node.labels, value)
    yield up
    yield from families.values()
    yield _links(nodes)
    yield from _prompts(nodes)
    yield from _stages(nodes)


def _metric_name(name: str) -> str:
    """Return the metric of a node's number called ``name``. Prometheus wants units in full."""
    if name.endswith("_per_s"):
        name = name.removesuffix("_s") + "_second"
    elif name.endswith("_s"):
        name = name.removesuffix("_s") + "_seconds"
    return f"kvrelay_node_{_NOT_A_NAME.sub('_', name)}"


def gauges(load: Load) -> dict[str, float]:
    """Return the numbers of ``load`` that rise and fall, by name."""
    values: dict[str, Any] = msgspec.structs.asdict(load)
    return {**{name: value for name, value in values.items() if name not in _NOT_SCALARS}, **load.gauges}


def words(name: str) -> str:
    """Return the help text of a metric that is called ``name``."""
    return name.replace("_", " ").capitalize() + "."


def _links(nodes: Iterable[NodeLoad]) -> Metric:
    """Return the speeds of the links to decode nodes."""
    speeds = GaugeMetricFamily(
        "kvrelay_node_link_bytes_per_second", "Speed of the link to a decode node.", labels=[*_NODE, "to"]
    )
    for node in nodes:
        for name, speed in node.load.link_bytes_per_s.items():
            speeds.add_metric([*node.labels, name], speed)
    return speeds


def _prompts(nodes: Iterable[NodeLoad]) -> Iterator[Metric]:
    """Yield the metrics by prompt length."""
    labels = [*_NODE, "prompt_tokens"]
    tokens = GaugeMetricFamily("kvrelay_node_queued_prompt_tokens", "Prompt tokens still to compute.", labels=labels)
    waits = HistogramMetricFamily(
        "kvrelay_node_prompt_wait_seconds", "Arrival at the node to first computed token.", labels=labels
    )
    for node in nodes:
        for name, value in zip(LENGTH_NAMES, node.load.prompt_tokens, strict=False):
            tokens.add_metric([*node.labels, name], value)
        for name, wait in zip(LENGTH_NAMES, node.load.prompt_waits, strict=False):
            waits.add_metric([*node.labels, name], cumulative(WAIT_BOUNDS_S, wait.counts), wait.total_s)
    yield tokens
    yield waits


def _stages(nodes: Iterable[NodeLoad]) -> Iterator[Metric]:
    """Yield the histograms of stages, tokens and transfers."""
    families = {
        "stage": HistogramMetricFamily(
            "kvrelay_node_stage_seconds", "Stages of requests on the node.", labels=[*_NODE, "stage"]
        ),
        histograms.FIRST_TOKEN: _histogram("first_token_seconds", "Arrival at the node to first token."),
        histograms.INTER_TOKEN: _histogram("inter_token_seconds", "Time between outputs of a request."),
        histograms.PER_OUTPUT_TOKEN: _histogram("per_output_token_seconds", "Mean time between tokens, per request."),
        histograms.TRANSFER: _histogram("kv_transfer_seconds", "First frame sent to last written.", "link"),
        histograms.TRANSFER_BYTES: _histogram("kv_transfer_bytes", "Bytes of the KV of a request.", "link"),
        histograms.TRANSFER_HIDDEN: _histogram(
            "kv_transfer_hidden_ratio", "Share of a transfer's time during which its prompt was computed.", "link"
        ),
    }
    for node in nodes:
        for report in node.load.histograms:
            is_stage = report.name in histograms.STAGES
            family = families.get("stage" if is_stage else report.name)
            if family is not None:  # else it is one of a later version
                _add(family, node, report, is_stage=is_stage)
    yield from families.values()


def _histogram(name: str, help_text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"kvrelay_node_{name}", help_text, labels=[*_NODE, *labels])


def _add(family: HistogramMetricFamily, node: NodeLoad, report: HistogramReport, *, is_stage: bool) -> None:
    label = report.name if is_stage else report.label
    buckets = cumulative(histograms.BOUNDS[report.name], report.counts)
    family.add_metric([*node.labels, *([label] if label else [])], buckets, report.total)
