"""Routing policies. To add one, add a class here and its name to ``POLICIES`` and ``RoutingPolicy`` (config)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from random import Random
from typing import Protocol

from kvrelay.config.cluster_config import Role
from kvrelay.config.sections import RoutingPolicy
from kvrelay.protocol.ids import NodeId
from router.node_table import Node
from router.request import RoutedRequest

REQUEST_TOKENS = 64
"""Load of each request, in tokens, added to the prompt tokens a node has still to compute."""

TRANSFER_COST = 1 / 8
"""Cost of transferring the KV of a token to a decode node, relative to computing it."""


class Policy(Protocol):
    """Chooses one node per call; may keep state. ``uses_prefixes``: nodes must report their prefix caches."""

    uses_prefixes: bool

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return one of ``candidates`` (at least one, in the order they registered) for ``request``."""


class LeastLoaded:
    """Chooses the node with the least added wait, divided by ``max_num_seqs``.

    The added wait is that of the prompt and of the prompts behind it (``Node.added_wait``). It counts requests of this
    router and those of others in the last heartbeat. Ties: the least recently chosen node.
    """

    uses_prefixes = False

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
    """Like ``LeastLoaded``, but counts only what the node's prefix cache lacks of the prompt, and that in full.

    A prefill or mixed node computes these tokens. A decode node receives them, which costs ``TRANSFER_COST`` as much.
    A decode node without free blocks for the prompt is chosen only if all others lack them too.
    """

    uses_prefixes = True

    def _cost(self, node: Node, request: RoutedRequest) -> tuple[bool, float]:
        num_uncached = request.num_tokens - request.num_cached_on(node)
        if node.role is Role.DECODE:
            lacks_blocks = bool(node.num_heartbeats) and node.prompt_blocks * node.block_size < num_uncached
            return lacks_blocks, _pressure(node, num_uncached) + TRANSFER_COST * num_uncached / node.max_num_seqs
        return False, _pressure(node, num_uncached) + num_uncached / node.max_num_seqs


class RoundRobin:
    """Chooses nodes in turn, ordered by name."""

    uses_prefixes = False

    def __init__(self) -> None:
        self._last = ""

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return the next of ``candidates``."""
        ordered = sorted(candidates, key=lambda node: node.node_id)
        chosen = next((node for node in ordered if node.node_id > self._last), ordered[0])
        self._last = chosen.node_id
        return chosen


class RandomChoice:
    """Chooses any node, each with the same probability."""

    uses_prefixes = False

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return one of ``candidates``."""
        return self._random.choice(candidates)


class PowerOfTwo:
    """Chooses the less loaded of two random nodes. Several routers with equal news do not all choose the same node."""

    uses_prefixes = False

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return one of ``candidates``."""
        two = self._random.sample(candidates, min(2, len(candidates)))
        return min(two, key=lambda node: _pressure(node, request.num_tokens))


class Session:
    """Chooses the same node for all requests of a session, and by load for requests without one.

    Rendezvous hashing: each session ranks all nodes, and the first available one is chosen. If a node leaves, only its
    sessions move.
    """

    uses_prefixes = False

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


POLICIES: Mapping[RoutingPolicy, Callable[[int], Policy]] = {
    "least_loaded": lambda seed: LeastLoaded(),
    "round_robin": lambda seed: RoundRobin(),
    "random": RandomChoice,
    "power_of_two": PowerOfTwo,
    "session": lambda seed: Session(),
    "cache_aware": lambda seed: CacheAware(),
}
"""Policies by their name in the config. The argument is a seed for those that choose at random."""
