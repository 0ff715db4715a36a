"""Resets of all prefix caches, each until every node has answered."""

from __future__ import annotations

from kvrelay.config.cluster_config import Role
from kvrelay.machine.laws import Laws, Violation
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.node_to_router import PrefixCacheReset
from kvrelay.protocol.messages.router_to_node import ResetPrefixCache
from router.events import CacheResetEnded, NodeReset, RouterOutbox
from router.node_table import NodeTable


class _Reset:
    """One reset. ``nodes``: what is known of each node, "no_answer" until it answers. ``later``: the decode nodes."""

    __slots__ = ("began_s", "later", "nodes", "number")

    def __init__(self, number: int, began_s: float, nodes: dict[PeerId, NodeReset], later: set[PeerId]) -> None:
        self.number = number
        self.began_s = began_s
        self.nodes = nodes
        self.later = later

    @property
    def silent(self) -> list[PeerId]:
        """The nodes that have not answered."""
        return [peer for peer, node in self.nodes.items() if node.state == "no_answer"]

    @property
    def first(self) -> list[PeerId]:
        """The silent ones that are asked before the decode nodes."""
        return [peer for peer in self.silent if peer not in self.later]


class CacheResets:
    """Asks the nodes of the table, again with each beat until they answer: a lost message costs time.

    Decode nodes are asked when all others have answered: what a prefill node hands off before its reset must be on the
    decode node before that one's. If one of the others is silent for half of ``timeout_s`` they are asked all the same.

    A reset ends when every node has answered or is lost, and ``timeout_s`` after it began in any case.
    """

    def __init__(self, node_table: NodeTable, outbox: RouterOutbox, timeout_s: float) -> None:
        self._node_table = node_table
        self._outbox = outbox
        self._timeout_s = timeout_s
        self._resets: dict[int, _Reset] = {}

    def begin(self, number: int) -> None:
        """Ask every node that is registered now."""
        nodes = {
            node.peer: NodeReset(node.node_id, "no_answer" if node.registration.resets_prefix_cache else "unsupported")
            for node in self._node_table
        }
        later = {node.peer for node in self._node_table if node.role is Role.DECODE}
        reset = self._resets[number] = _Reset(number, self._outbox.now, nodes, later)
        self._ask(reset)
        self._end_if_over(reset)

    def take(self, peer: PeerId, message: PrefixCacheReset) -> None:
        """Note the answer of ``peer``."""
        node = self._node_table.get(peer)
        if node is not None:
            node.prefixes.clear()
        reset = self._resets.get(message.reset)
        if reset is not None and peer in reset.nodes:
            was_waited_for = peer in reset.first
            reset.nodes[peer] = NodeReset(reset.nodes[peer].node_id, "reset", message.num_blocks)
            if was_waited_for and not reset.first:
                self._ask(reset)
            self._end_if_over(reset)

    def beat(self) -> None:
        """Ask those again that have not answered, and give up the lost ones. To be called at each heartbeat."""
        for reset in list(self._resets.values()):
            for peer in reset.silent:
                if self._node_table.get(peer) is None:
                    reset.nodes[peer] = NodeReset(reset.nodes[peer].node_id, "lost")
            self._ask(reset)
            self._end_if_over(reset)

    def laws_at_rest(self) -> Laws:
        """Check that no reset is in progress."""
        if self._resets:
            yield [Violation(f"{len(self._resets)} resets of prefix caches are in progress")]

    def _ask(self, reset: _Reset) -> None:
        is_late = self._outbox.now - reset.began_s >= self._timeout_s / 2
        for peer in reset.silent if is_late else reset.first or reset.silent:
            self._outbox.send(peer, ResetPrefixCache(reset=reset.number))

    def _end_if_over(self, reset: _Reset) -> None:
        if not reset.silent or self._outbox.now - reset.began_s >= self._timeout_s:
            del self._resets[reset.number]
            self._outbox.do(CacheResetEnded(reset.number, tuple(reset.nodes.values())))
