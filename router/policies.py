"""Routing policies. To add one, add a class here and its name to ``POLICIES`` and ``RoutingPolicy`` (config)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from random import Random

from kvrelay.config.cluster_config import Role
from kvrelay.config.sections import RoutingPolicy
from kvrelay.protocol.ids import NodeId
from router.least_ttft import LeastTTFT
from router.node_table import Node, NodeTable
from router.policy import REQUEST_TOKENS, Policy
from router.request import RoutedRequest

TRANSFER_COST = 1 / 8
"""Cost of transferring the KV of a token to a decode node, relative to computing it."""


UNCACHED_WEIGHT = 6
"""Cost of computing a token on a node whose prefix cache lacks it, relative to waiting for one.

More than 1, because the copy of the prefix takes the blocks of others, and the next turn of a chat may go to either
copy.
The value is the best of 1, 2, 3, 4, 6 and 12 in ``benchmarks/routing.py``.
"""


class LeastLoaded(Policy):
    """Chooses the node with the least added wait, divided by ``max_num_seqs``.

    The added wait is that of the prompt and of the prompts behind it (``Node.added_wait``). It counts requests of this
    router and those of others in the last heartbeat. Ties: the least recently chosen node.
    """

    def __init__(self) -> None:
        self._last_chosen: dict[NodeId, int] = {}
        self._num_chosen = 0

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return the least loaded of ``candidates``."""
        chosen = min(candidates, key=lambda node: (self._cost(node, request), self._last_chosen.get(node.node_id, 0)))
        self._num_chosen += 1
        self._last_chosen[chosen.node_id] = self._num_chosen
        return chosen

    def _cost(self, node: Node, request: RoutedRequest) -> tuple[bool, float]:
        return False, _pressure(node, request.num_tokens)


class CacheAware(LeastLoaded):
    """Like ``LeastLoaded``, but counts only the tokens of the prompt that the node's prefix cache lacks.

    A prefill or mixed node computes them (``UNCACHED_WEIGHT``), a decode node receives them (``TRANSFER_COST``).
    A decode node without free blocks for the prompt is chosen only if all others lack them too.
    """

    uses_prefixes = True

    def _cost(self, node: Node, request: RoutedRequest) -> tuple[bool, float]:
        num_uncached = request.num_tokens - request.num_cached_on(node)
        if node.role is Role.DECODE:
            lacks_blocks = bool(node.num_heartbeats) and node.prompt_blocks * node.block_size < num_uncached
            return lacks_blocks, _pressure(node, num_uncached) + TRANSFER_COST * num_uncached / node.max_num_seqs
        return False, _pressure(node, num_uncached) + UNCACHED_WEIGHT * num_uncached / node.max_num_seqs


class RoundRobin(Policy):
    """Chooses nodes in turn, ordered by name."""

    def __init__(self) -> None:
        self._last = ""

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return the next of ``candidates``."""
        ordered = sorted(candidates, key=lambda node: node.node_id)
        chosen = next((node for node in ordered if node.node_id > self._last), ordered[0])
        self._last = chosen.node_id
        return chosen


class RandomChoice(Policy):
    """Chooses any node, each with the same probability."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return one of ``candidates``."""
        return self._random.choice(candidates)


class PowerOfTwo(Policy):
    """Chooses the less loaded of two random nodes. Several routers with equal news do not all choose the same node."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return one of ``candidates``."""
        two = self._random.sample(candidates, min(2, len(candidates)))
        return min(two, key=lambda node: _pressure(node, request.num_tokens))


class Session(Policy):
    """Chooses the same node for all requests of a session, and by load for requests without one.

    Rendezvous hashing: each session ranks all nodes, and the first available one is chosen. If a node leaves, only its
    sessions move.
    """

    def __init__(self) -> None:
        self._without_session = LeastLoaded()

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return the first of ``candidates`` in the order of the session of ``request``."""
        session = request.new.session
        if not session:
            return self._without_session.choose(candidates, request)
        return max(candidates, key=lambda node: sha256(f"{session}\0{node.node_id}".encode()).digest())


def _pressure(node: Node, num_tokens: int) -> float:
    """Return the load of ``node`` for a prompt of ``num_tokens``. For decode nodes the prompt is not counted."""
    wait_tokens = node.pending_tokens if node.role is Role.DECODE else node.added_wait(num_tokens)
    return (wait_tokens + REQUEST_TOKENS * node.num_requests) / node.max_num_seqs


POLICIES: Mapping[RoutingPolicy, Callable[[NodeTable, int], Policy]] = {
    "least_loaded": lambda nodes, seed: LeastLoaded(),
    "round_robin": lambda nodes, seed: RoundRobin(),
    "random": lambda nodes, seed: RandomChoice(seed),
    "power_of_two": lambda nodes, seed: PowerOfTwo(seed),
    "session": lambda nodes, seed: Session(),
    "cache_aware": lambda nodes, seed: CacheAware(),
    "ttft": lambda nodes, seed: LeastTTFT(nodes),
}
"""Policies by their name in the config. The arguments: all nodes, and a seed for policies that choose at random."""
