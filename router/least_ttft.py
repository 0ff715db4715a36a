"""The routing policy that predicts times to first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.ids import NodeId
from router.node_table import Node, NodeTable
from router.policy import REQUEST_TOKENS, Policy
from router.prediction import Prediction, exposed_transfer_s, link_bytes_per_s, mean_tokens_per_s, predict
from router.request import RoutedRequest


class Receiver(NamedTuple):
    """A decode node that may get the KV of a prompt.

    ``lacks_blocks``: for its part of the prompt. ``num_bytes``: of the KV that it lacks. ``busy_s``: the time that its
    requests take from a new one.
    """

    node: Node
    lacks_blocks: bool
    num_bytes: float
    busy_s: float


def _wait_for_kv(prefill: Node | None, receiver: Receiver, prefill_s: float) -> tuple[bool, float]:
    """Return whether ``receiver`` lacks blocks, and what it adds to the time until the second token, in seconds."""
    if prefill is None:
        return receiver.lacks_blocks, receiver.busy_s
    bytes_per_s = link_bytes_per_s(prefill, receiver.node)
    num_layers = receiver.node.registration.geometry.num_layers
    exposed_s = exposed_transfer_s(receiver.num_bytes, bytes_per_s, prefill_s, num_layers)
    return receiver.lacks_blocks, exposed_s + receiver.busy_s


class LeastTTFT(Policy):
    """Chooses the pair of prefill and decode node, or the mixed node, with the least predicted time to first token.

    That time is the wait for other prompts and the computation of what the node's prefix cache lacks
    (``router.prediction``). The KV transfer is not in it: the prefill node sends the first token while the last layers
    are still on their way. What is not hidden behind the prefill delays the second token. Pairs are therefore ranked by
    the sum of both, and limits of the time to first token apply to the first part alone. Where the node that computes
    the prompt also decodes, nothing is transferred.

    A decode node without free blocks for its part of the prompt comes last. Else the exposed transfer counts, and how
    busy the node is: as if each of its requests were ``REQUEST_TOKENS`` prompt tokens to compute.
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
        if candidates[0].role is Role.DECODE:
            prefill, receivers = self._nodes.get(request.prefill), self._receivers(candidates, request)
            prefill_s = 0.0 if prefill is None else self.predict(prefill, request).prefill_s
            costs = [_wait_for_kv(prefill, receiver, prefill_s) for receiver in receivers]
        else:
            decode_nodes = [] if request.wants_one_token else self._nodes.available(Role.DECODE)
            receivers = self._receivers(decode_nodes, request)
            costs = [self._cost(node, request, receivers) for node in candidates]
        turns = [self._last_chosen.get(node.node_id, 0) for node in candidates]
        chosen = candidates[min(range(len(candidates)), key=lambda index: (costs[index], turns[index]))]
        self._num_chosen += 1
        self._last_chosen[chosen.node_id] = self._num_chosen
        return chosen

    def predict(self, node: Node, request: RoutedRequest) -> Prediction:
        """Return the time to first token if ``node`` computes the prompt."""
        return predict(node, request, mean_tokens_per_s(self._nodes))

    def backlog(self, request: RoutedRequest, node: Node) -> float:
        """Return the predicted time to first token, in prompt tokens that nodes compute in this time on average."""
        return self.predict(node, request).ttft_s * mean_tokens_per_s(self._nodes)

    def _cost(self, node: Node, request: RoutedRequest, receivers: Sequence[Receiver]) -> tuple[bool, float]:
        prediction = self.predict(node, request)
        if node.role is not Role.PREFILL:
            return False, prediction.ttft_s + REQUEST_TOKENS * node.num_requests / mean_tokens_per_s(self._nodes)
        lacks_blocks, wait_s = min(
            (_wait_for_kv(node, receiver, prediction.prefill_s) for receiver in receivers), default=(False, 0.0)
        )
        return lacks_blocks, prediction.ttft_s + wait_s

    def _receivers(self, decode_nodes: Sequence[Node], request: RoutedRequest) -> list[Receiver]:
        """Return what a choice of each of ``decode_nodes`` means, apart from the prefill node."""
        tokens_per_s = mean_tokens_per_s(self._nodes)
        receivers = []
        for node in decode_nodes:
            num_uncached = request.num_tokens - request.num_cached_on(node)
            lacks_blocks = bool(node.num_heartbeats) and node.prompt_blocks * node.block_size < num_uncached
            busy_s = (node.pending_tokens + REQUEST_TOKENS * node.num_requests) / tokens_per_s
            receivers.append(Receiver(node, lacks_blocks, num_uncached * node.token_bytes, busy_s))
        return receivers
