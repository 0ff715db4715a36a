"""Which of several nodes gets a request. A further policy is a further class here and a name in ``POLICIES``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvrelay.core.ids import NodeId
from router.registry import Node

REQUEST_TOKENS = 64
"""What each request counts for beside the prompt tokens that a node must yet compute."""


class Policy(Protocol):
    """Chooses one node at a time; may remember what it chose."""

    def choose(self, candidates: Sequence[Node], prompt_token_ids: Sequence[int]) -> Node:
        """Return one of ``candidates`` (at least one, in the order they registered) for this prompt."""


class LeastLoaded:
    """The node with the least work per request it may run at once.

    Work is what this router has given it, and what its last heartbeat told of others'. Of equals the one that was not
    chosen for longest.
    """

    def __init__(self) -> None:
        self._last_chosen: dict[NodeId, int] = {}
        self._num_chosen = 0

    def choose(self, candidates: Sequence[Node], prompt_token_ids: Sequence[int]) -> Node:
        """Return the least loaded of ``candidates``."""
        chosen = min(candidates, key=lambda node: (_pressure(node), self._last_chosen.get(node.node_id, 0)))
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


def _pressure(node: Node) -> float:
    return (node.pending_tokens + REQUEST_TOKENS * node.num_requests) / node.max_num_seqs


POLICIES: dict[str, Callable[[], Policy]] = {"least_loaded": LeastLoaded, "round_robin": RoundRobin}
"""Every policy by the name the config gives it."""
