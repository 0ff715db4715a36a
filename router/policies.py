"""Which of several nodes gets a request. A further policy is a further class here and a name in ``POLICIES``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.ids import NodeId
from router.node_table import Node

REQUEST_TOKENS = 64
"""What each request counts for beside the prompt tokens that a node must yet compute."""


class Policy(Protocol):
    """Chooses one node at a time; may remember what it chose."""

    def choose(self, candidates: Sequence[Node], prompt_token_ids: Sequence[int]) -> Node:
        """Return one of ``candidates`` (at least one, in the order they registered) for this prompt."""


class LeastLoaded:
    """The node where a prompt adds least waiting per request that the node may run at once.

    Waiting is for the prompts before it, and of those behind it (``Node.added_wait``): what this router has given the
    node, and what its last heartbeat told of others'. Of equals the one that was not chosen for longest.
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
    """One node after the other, by name."""

    def __init__(self) -> None:
        self._last = ""

    def choose(self, candidates: Sequence[Node], prompt_token_ids: Sequence[int]) -> Node:
        """Return the next of ``candidates``."""
        ordered = sorted(candidates, key=lambda node: node.node_id)
        chosen = next((node for node in ordered if node.node_id > self._last), ordered[0])
        self._last = chosen.node_id
        return chosen


def _pressure(node: Node, num_tokens: int) -> float:
    """Return the load of ``node`` for a prompt of ``num_tokens``. Decode nodes are compared without that prompt."""
    wait_tokens = node.pending_tokens if node.role is Role.DECODE else node.added_wait(num_tokens)
    return (wait_tokens + REQUEST_TOKENS * node.num_requests) / node.max_num_seqs


POLICIES: dict[str, Callable[[], Policy]] = {"least_loaded": LeastLoaded, "round_robin": RoundRobin}
"""Every policy by the name the config gives it."""
