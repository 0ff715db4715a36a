"""The routing policy that predicts times to first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.ids import NodeId
from router.node_table import Node, NodeTable
from router.policy import REQUEST_TOKENS, Policy
from router.prediction import Prediction
from router.request import RoutedRequest
from router.speeds import exposed_transfer_s, link_speeds, mean_tokens_per_s, predict

EVICTION_FACTOR = 3
"""Tokens to compute, in all, for each token computed on a node whose prefix cache lacks it.

Its KV takes the place of that of another one. If prefix caches have two thirds of what prompts ask for, that one is
computed again with a probability of 2/3, and so on: 1 / (1 - 2/3).
"""


class LeastTTFT(Policy):
    """Chooses the pair of prefill and decode node, or the mixed node, with the least predicted times to first token.

    **The time of the request itself** is the wait for other prompts and the computation of what the node's prefix
    cache lacks (``router.speeds``). The KV transfer is not in it: the prefill node sends the first token itself,
    while the last layers are still on their way. What the prefill does not hide delays the second token. So it counts
    for the choice of a pair, and limits of the time to first token do not apply to it. Where the node that computes the
    prompt also decodes, nothing is transferred.

    **The times of others** count too. A choice that ignores them moves a chat away from its prefix cache to save itself
    a short wait, and all later prompts wait for what is computed twice. Each token that has to be computed delays

    - prompts that wait on the node and are longer, where the shortest goes first;
    - prompts to come: while a node is busy, about as many come as wait now (Little's law). What counts is the node
      where fewest wait: if one is idle, they can go there;
    - whoever has the KV whose place it takes (``EVICTION_FACTOR``).

    **The decode node**: one without free blocks for its part of the prompt comes last. Else the exposed transfer
    counts, and how busy the node is: as if each of its requests were ``REQUEST_TOKENS`` prompt tokens to compute.
    """

    uses_prefixes = True

    def __init__(self, nodes: NodeTable) -> None:
        self._nodes = nodes
        self._last_chosen: dict[NodeId, int] = {}
        self._num_chosen = 0

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return the best prefill or mixed node, or of decode nodes the best for the prefill node of ``request``.

        Ties: the least recently chosen node.
        """
        chosen = self.would_choose(candidates, request)
        self._num_chosen += 1
        self._last_chosen[chosen.node_id] = self._num_chosen
        return chosen

    def would_choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """See Policy."""
        tokens_per_s = mean_tokens_per_s(self._nodes)
        if candidates[0].role is Role.DECODE:
            prefill = self._nodes.get(request.prefill)
            prefill_s = 0.0 if prefill is None else predict(prefill, request, tokens_per_s).prefill_s
            receivers = _receivers(candidates, request, tokens_per_s)
            costs = _waits_for_kv(prefill, receivers, prefill_s)
        else:
            decode_nodes = [] if request.wants_one_token else self._nodes.available(Role.DECODE)
            receivers = _receivers(decode_nodes, request, tokens_per_s)
            token_delay_s = (EVICTION_FACTOR * (1 + self._least_num_prompts()) - 1) / tokens_per_s
            costs = [_cost(node, request, receivers, tokens_per_s, token_delay_s) for node in candidates]
        turns = [self._last_chosen.get(node.node_id, 0) for node in candidates]
        return candidates[min(range(len(candidates)), key=lambda index: (costs[index], turns[index]))]

    def predict(self, node: Node, request: RoutedRequest) -> Prediction:
        """Return the time to first token if ``node`` computes the prompt."""
        return predict(node, request, mean_tokens_per_s(self._nodes))

    def backlog(self, request: RoutedRequest, node: Node) -> float:
        """Return the predicted time to first token, in prompt tokens that nodes compute in this time on average."""
        return self.predict(node, request).ttft_s * mean_tokens_per_s(self._nodes)

    def _least_num_prompts(self) -> int:
        """Return how many prompts the prefill or mixed node has still to compute that has fewest."""
        return min((node.num_prompts for node in self._nodes.available(Role.PREFILL, Role.MIXED)), default=0)


class _Receiver(NamedTuple):
    """A decode node that may get the KV of a prompt.

    ``lacks_blocks``: for its part of the prompt. ``num_bytes``: of the KV that it lacks. ``busy_s``: the time that its
    requests take from a new one.
    """

    node: Node
    lacks_blocks: bool
    num_bytes: float
    busy_s: float


def _receivers(decode_nodes: Sequence[Node], request: RoutedRequest, tokens_per_s: float) -> list[_Receiver]:
    """Return what a choice of each of ``decode_nodes`` means, whichever node computes the prompt."""
    receivers = []
    for node in decode_nodes:
        num_uncached = request.num_tokens - request.num_cached_on(node)
        lacks_blocks = bool(node.num_heartbeats) and node.prompt_blocks * node.block_size < num_uncached
        busy_s = (node.pending_tokens + REQUEST_TOKENS * node.num_requests) / tokens_per_s
        receivers.append(_Receiver(node, lacks_blocks, num_uncached * node.token_bytes, busy_s))
    return receivers


def _waits_for_kv(prefill: Node | None, receivers: Sequence[_Receiver], prefill_s: float) -> list[tuple[bool, float]]:
    """Return of each receiver whether it lacks blocks, and what it adds to the time until the second token, in seconds.

    For each request there are as many as pairs of nodes, so what depends on ``prefill`` alone is computed once.
    """
    if prefill is None:
        return [(receiver.lacks_blocks, receiver.busy_s) for receiver in receivers]
    speeds, of_others = link_speeds(prefill)
    num_layers = prefill.registration.geometry.num_layers
    waits = []
    for node, lacks_blocks, num_bytes, busy_s in receivers:
        bytes_per_s = speeds.get(node.node_id, of_others)
        waits.append((lacks_blocks, busy_s + exposed_transfer_s(num_bytes, bytes_per_s, prefill_s, num_layers)))
    return waits


def _cost(
    node: Node, request: RoutedRequest, receivers: Sequence[_Receiver], tokens_per_s: float, token_delay_s: float
) -> tuple[bool, float]:
    """Return whether all decode nodes lack blocks, and for how long ``request`` and others wait if ``node`` gets it.

    ``token_delay_s``: what each token that has to be computed costs requests that are not on ``node`` now.
    """
    prediction = predict(node, request, tokens_per_s)
    num_uncached = request.num_tokens - request.num_cached_on(node)
    others_s = prediction.prefill_s * node.num_delayed(num_uncached) + token_delay_s * num_uncached
    cost_s = prediction.ttft_s + others_s
    if node.role is not Role.PREFILL:
        return False, cost_s + REQUEST_TOKENS * node.num_requests / tokens_per_s
    lacks_blocks, wait_s = min(_waits_for_kv(node, receivers, prediction.prefill_s), default=(False, 0.0))
    return lacks_blocks, cost_s + wait_s
