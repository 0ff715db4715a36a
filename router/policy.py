"""What a routing policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from router.node_table import Node
from router.prediction import Prediction
from router.request import RoutedRequest

REQUEST_TOKENS = 64
"""Load of each request, in tokens, added to the prompt tokens a node has still to compute."""


class Policy(ABC):
    """Chooses one node per call; may keep state. ``uses_prefixes``: nodes must report their prefix caches."""

    uses_prefixes = False

    @abstractmethod
    def choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        """Return one of ``candidates`` (at least one, in the order they registered) for ``request``."""

    def would_choose(self, candidates: Sequence[Node], request: RoutedRequest) -> Node | None:
        """Return what ``choose`` would return, without a trace of it; None: this policy does not predict times."""
        return None

    def backlog(self, request: RoutedRequest, node: Node) -> float:
        """Return how far ``node`` is behind if it has to compute the prompt, in prompt tokens."""
        return node.tokens_before(request.num_tokens)

    def predict(self, node: Node, request: RoutedRequest) -> Prediction | None:
        """Return the time to first token if ``node`` computes the prompt; None: this policy does not predict it."""
        return None
