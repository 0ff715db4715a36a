"""Assignment of requests to nodes, chosen by the routing policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.ids import NodeId, PeerId, RequestId
from router.node_table import Node, NodeTable
from router.policy import Policy
from router.prediction import Prediction, Predictions
from router.request import RoutedRequest

Choose: TypeAlias = Callable[[Sequence[Node], RoutedRequest], Node | None]
"""How a routing policy chooses, or would choose."""


class Placement:
    """Assigns requests to nodes and releases them. Updates the request and its nodes together.

    ``local_prefill_tokens`` is the threshold of conditional disaggregation: a decode node computes a prompt itself if
    the backlog of every prefill node (``Policy.backlog``) is at least this many prompt tokens longer than that of the
    decode node, or if there is no prefill node. None: never.
    """

    def __init__(
        self,
        node_table: NodeTable,
        prefill_routing: Policy,
        decode_routing: Policy,
        local_prefill_tokens: int | None = None,
    ) -> None:
        self._node_table = node_table
        self._prefill_routing = prefill_routing
        self._decode_routing = decode_routing
        self._local_prefill_tokens = local_prefill_tokens
        self.predictions = Predictions()

    def enter(self, request: RoutedRequest, now: float) -> Node | None:
        """Choose the node that begins ``request`` at time ``now``; None if there is none.

        It is a mixed node, a prefill node if a decode node is available, or a decode node that also computes the
        prompt. Nodes that failed the request come last.
        """
        chosen = self._entry(request, self._prefill_routing.choose)
        if chosen is None:
            return None
        raw = self._prefill_routing.predict(chosen, request)
        request.predictions = None
        if raw is not None:
            request.predictions = raw, self.predictions.corrected(raw, now), now
            self.predictions.dispatched(raw, now)
        chosen.pending[request.request_id] = request.num_tokens
        request.is_prompt_pending = True
        if self._prefill_routing.uses_prefixes:
            chosen.pending[request.request_id] -= request.num_cached_on(chosen)
            chosen.prefixes.expect(request.prefix_keys(chosen))
        if chosen.role is Role.PREFILL:
            request.prefill = chosen.peer
            return chosen
        request.decode = chosen.peer
        if chosen.role is Role.DECODE:
            chosen.give(_num_blocks(request, chosen))
        return chosen

    def predict(self, request: RoutedRequest, now: float) -> Prediction | None:
        """Return the predicted time to first token on the node that would begin ``request`` now.

        None if there is no node, or the policy predicts none.
        """
        node = self._entry(request, self._prefill_routing.would_choose)
        raw = None if node is None else self._prefill_routing.predict(node, request)
        return None if raw is None else self.predictions.corrected(raw, now)

    def _entry(self, request: RoutedRequest, choose: Choose) -> Node | None:
        decode_nodes = self._node_table.available(Role.DECODE)
        nodes = self._node_table.available(Role.MIXED)
        if request.wants_one_token or decode_nodes:
            nodes += self._node_table.available(Role.PREFILL)
        helpers = decode_nodes if self._local_prefill_tokens is not None else []
        untried = _untried(request, nodes)
        untried_helpers = _untried(request, helpers)
        if not untried and (untried_helpers or not nodes):
            return min(untried_helpers or helpers, key=partial(self._helpfulness, request), default=None)
        nodes = untried or nodes
        chosen = choose(nodes, request)
        if chosen is None or chosen.role is not Role.PREFILL:
            return chosen
        return min(
            self._ahead(request, nodes, untried_helpers), key=partial(self._helpfulness, request), default=chosen
        )

    def _ahead(self, request: RoutedRequest, nodes: list[Node], helpers: list[Node]) -> list[Node]:
        """Return those of ``helpers`` that have room for the prompt and are ahead of all prefill nodes in ``nodes``."""
        backlog = partial(self._prefill_routing.backlog, request)
        least_behind = min(backlog(node) for node in nodes if node.role is Role.PREFILL)
        return [
            node
            for node in helpers
            if least_behind - backlog(node) >= (self._local_prefill_tokens or 0)
            and node.prompt_blocks >= _num_blocks(request, node)
        ]

    def _helpfulness(self, request: RoutedRequest, node: Node) -> tuple[bool, bool, float, int]:
        """Sort key of decode nodes that could compute the prompt of ``request``, best first.

        Nodes with room come first, then nodes that will have room, then nodes too small for it. Ties: less backlog.
        """
        num_blocks = _num_blocks(request, node)
        never_fits = node.registration.num_blocks < num_blocks - 1
        backlog = self._prefill_routing.backlog(request, node)
        return node.prompt_blocks < num_blocks, never_fits, backlog, -node.prompt_blocks

    def assign_decode(self, request: RoutedRequest) -> Node | None:
        """Choose a decode node that has not refused the request; None if there is none."""
        nodes = [node for node in self._node_table.available(Role.DECODE) if node.peer not in request.refused_by]
        nodes = [node for node in nodes if node.peer not in request.avoid] or nodes
        if not nodes:
            return None
        chosen = self._decode_routing.choose(nodes, request)
        if self._decode_routing.uses_prefixes:
            chosen.prefixes.expect(request.prefix_keys(chosen))
        chosen.pending[request.request_id] = 0
        request.decode = chosen.peer
        request.participants.add(chosen.peer)
        return chosen

    def move_decode(self, request: RoutedRequest, num_blocks: int) -> Node | None:
        """Move a preempted request to the node with most spare blocks; None if none has at least ``num_blocks``."""
        others = [
            node
            for node in self._node_table.available(Role.DECODE, Role.MIXED)
            if node.peer not in request.nodes and node.peer not in request.avoid and node.spare_blocks >= num_blocks
        ]
        if not others:
            return None
        chosen = max(others, key=lambda node: node.spare_blocks)
        self.release(request)
        chosen.give(num_blocks)
        chosen.pending[request.request_id] = 0
        request.decode = chosen.peer
        return chosen

    def adopt_decode(self, request: RoutedRequest, peer: PeerId) -> bool:
        """Make ``peer``, which sent tokens of the current attempt, the request's decode node; False if it is not one.

        It differs from the node assigned last only if two assignments crossed.
        """
        node = self._node_table.get(peer)
        if node is None or node.role is not Role.DECODE:
            return False
        self.release_decode(request)
        node.pending[request.request_id] = 0
        request.decode = peer
        return True

    def has_untried(self, request: RoutedRequest) -> bool:
        """Return whether ``request`` could be served by nodes that have neither failed it nor hold it now."""
        tried = request.avoid.union(request.nodes)
        roles = {node.role for node in self._node_table if node.peer not in tried and not node.leaving}
        return self._node_table.can_serve(roles)

    def first_token_came(self, request: RoutedRequest, now: float) -> None:
        """Compare the time to the first token with what was predicted, unless an earlier attempt had failed."""
        if request.predictions is not None and request.attempts == 1:
            raw, corrected, dispatched_s = request.predictions
            self.predictions.observe(raw, corrected, now - dispatched_s, now)

    def prompt_is_computed(self, request: RoutedRequest) -> None:
        """Record that no prompt tokens are left to compute."""
        if request.is_prompt_pending:
            request.is_prompt_pending = False
            for node in self._nodes(request):
                node.pending[request.request_id] = 0

    def release_prefill(self, request: RoutedRequest) -> None:
        """Release the prefill node: nothing depends on its part of ``request`` any more."""
        self._release(request, request.prefill)
        request.prefill = None

    def release_decode(self, request: RoutedRequest) -> None:
        """Release the decode node."""
        self._release(request, request.decode)
        request.decode = None

    def release(self, request: RoutedRequest) -> None:
        """Release all nodes of ``request``."""
        self.release_prefill(request)
        self.release_decode(request)

    def held(self) -> dict[NodeId, list[RequestId]]:
        """Return the request ids by node, for nodes that have any."""
        return {node.node_id: list(node.pending) for node in self._node_table if node.pending}

    def _release(self, request: RoutedRequest, peer: PeerId | None) -> None:
        node = self._node_table.get(peer)
        if node is not None:
            node.pending.pop(request.request_id, None)

    def _nodes(self, request: RoutedRequest) -> list[Node]:
        return [node for peer in request.nodes if (node := self._node_table.get(peer)) is not None]


def _untried(request: RoutedRequest, nodes: list[Node]) -> list[Node]:
    return [node for node in nodes if node.peer not in request.avoid]


def _num_blocks(request: RoutedRequest, node: Node) -> int:
    """Return the KV blocks ``request`` needs on ``node``, plus one for growth."""
    return -(-request.num_tokens // node.block_size) + 1
