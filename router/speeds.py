"""Speeds of nodes and links as they report them, and the times of requests that follow from these.

Speeds are measured, not configured. A node that has not measured its own (it has just started, or has computed no
prompt in the last minute) counts as being as fast as the others are on average, and if no node has measured any, as the
defaults below. A node that restarts is another ``Node``, so that nothing of the old one counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from router.node_table import Node
from router.prediction import Prediction
from router.request import RoutedRequest

DEFAULT_TOKENS_PER_S = 5_000.0
"""Prompt tokens per second of nodes of which nothing is measured."""

DEFAULT_BYTES_PER_S = 1e9
"""KV bytes per second of links of which nothing is measured."""


def mean_tokens_per_s(nodes: Iterable[Node]) -> float:
    """Return how many prompt tokens per second those of ``nodes`` compute that have measured it, on average."""
    measured = [node.load.prefill_tokens_per_s for node in nodes if node.load.prefill_tokens_per_s > 0]
    return statistics.fmean(measured) if measured else DEFAULT_TOKENS_PER_S


def predict(node: Node, request: RoutedRequest, others_tokens_per_s: float) -> Prediction:
    """Predict the time to first token of ``request`` if ``node`` computes the prompt.

    ``others_tokens_per_s``: the speed of ``node`` if it has not measured any.
    """
    measured = node.load.prefill_tokens_per_s
    tokens_per_s = measured or others_tokens_per_s
    num_uncached = request.num_tokens - request.num_cached_on(node)
    queue_s = node.tokens_before(num_uncached) / tokens_per_s
    return Prediction(queue_s, num_uncached / tokens_per_s, num_uncached, measured > 0)


def link_speeds(prefill: Node) -> tuple[Mapping[str, float], float]:
    """Return how fast ``prefill`` moves KV: bytes per second by decode node, and for the nodes that are not in it."""
    measured = prefill.load.link_bytes_per_s
    speeds = [speed for speed in measured.values() if speed > 0]
    return measured, statistics.fmean(speeds) if speeds else DEFAULT_BYTES_PER_S


def exposed_transfer_s(num_bytes: float, bytes_per_s: float, prefill_s: float, num_layers: int) -> float:
    """Return for how many seconds the second token waits for the KV after the first token.

    The KV of a layer moves while later layers are computed, and that of the prefill node's prefix cache from the
    beginning. What remains is the last layer, or what is more than moves during ``prefill_s``. A link without any speed
    is never done.
    """
    transfer_s = num_bytes / bytes_per_s if bytes_per_s > 0 else math.inf
    return max(transfer_s / num_layers, transfer_s - prefill_s)
