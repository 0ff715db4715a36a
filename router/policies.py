"""Routing policies. To add one, add a class here and its name to ``POLICIES``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.ids import NodeId
from router.node_table import Node

REQUEST_TOKENS = 64
"""Load of each request, in tokens, added to the prompt tokens a node has still to compute."""


class Policy(Protocol):
    """Chooses one node per call; may keep state."""

    def choose(self, candidates: Sequence[Node], prompt_token_ids: Sequence[int]) -> Node:
        """Return one of ``candidates`` (at least one, in the order they registered) for this prompt."""


class LeastLoaded:
    """Chooses the node with the least added wait, divided by ``max_num_seqs``.

    The added wait is that of the prompt and of the prompts behind it (``Node.added_wait``). It counts requests of this
    router and those of others in the last heartbeat. Ties: the least recently chosen node.
    """

    def __init__(self) -> None:
        self._last_chosen: dict[NodeId, int] = {}
        self._num_chosen = 0

    def choose(self, candidates: Sequence[Node], prompt_token_ids: Sequence[int]) -> Node:
        """Return the least loaded of ``candidates``."""
        num_tokens = len(prompt_token_ids)
        chosen = min(candidates, key=lambda node: (_pressure(node, num_tokens), self._last_chosen.get(node.node_id, 0)))
        self._num_chosen += 1
        self._last_chosen[chosen.node_id] = self._num_chosen
        return chosen


class RoundRobin:
    """Chooses nodes in turn, ordered by name."""

    def __init__(self) -> None:
        self._last = ""

    def choose(self, candidates: Sequence[Node], prompt_token_ids: Sequence[int]) -> Node:
        """Return the next of ``candidates``."""
        ordered = sorted(candidates, key=lambda node: node.node_id)
        chosen = next((node for node in ordered if node.node_id > self._last), ordered[0])
        self._last = chosen.node_id
        return chosen


def _pressure(node: Node, num_tokens: int) -> float:
    """Return the load of ``node`` for a prompt of ``num_tokens``. For decode nodes the prompt is not counted."""
    wait_tokens = node.pending_tokens if node.role is Role.DECODE else node.added_wait(num_tokens)
    return (wait_tokens + REQUEST_TOKENS * node.num_requests) / node.max_num_seqs


POLICIES: dict[str, Callable[[], Policy]] = {"least_loaded": LeastLoaded, "round_robin": RoundRobin}
"""Policies by their name in the config."""
