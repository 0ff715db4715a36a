"""The registered nodes, with their load and liveness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from kvrelay.config.cluster_config import Role
from kvrelay.machine.liveness import Liveness
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.geometry import PROTOCOL_VERSION
from kvrelay.protocol.ids import NodeId, PeerId, RequestId, peer_id
from kvrelay.protocol.messages.base import Load, NodeAddress
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.prompt_lengths import length_class
from router.expected_nodes import ExpectedNode
from router.node_totals import NodeTotals
from router.prefixes import NodePrefixes


@dataclass(slots=True, eq=False)
class Node:
    """A registered node. ``pending``: this router's requests on it, with the prompt tokens each has still to compute.
    ``prefixes``: what its prefix cache has, if routing asks for that. ``hasher``: names the blocks of prompts there.

    ``load`` is from its last heartbeat; ``num_heartbeats`` were received so far. ``num_given_requests`` needing
    ``num_given_blocks`` were assigned since then: moved preempted requests, and local prefills on a decode node.
    """

    peer: PeerId
    registration: Register
    load: Load = field(default_factory=Load)
    num_heartbeats: int = 0
    num_given_requests: int = 0
    num_given_blocks: int = 0
    leaving: bool = False
    pending: dict[RequestId, int] = field(default_factory=dict)
    prefixes: NodePrefixes = field(default_factory=NodePrefixes)
    _foreign_requests: int = 0
    _foreign_tokens: int = 0
    role: Role = field(init=False)
    hasher: BlockHasher = field(init=False)

    def __post_init__(self) -> None:
        geometry = self.registration.geometry
        self.role = Role(self.registration.role)
        self.hasher = BlockHasher(geometry.model_digest, geometry.block_size)

    @property
    def node_id(self) -> NodeId:
        """Its name in the config."""
        return self.registration.node_id

    @property
    def address(self) -> NodeAddress:
        """The address for other nodes."""
        return NodeAddress(peer=self.peer, address=self.registration.address)

    def load_as_dict(self) -> dict[str, Any]:
        """Return its last reported load, without histograms."""
        loads: dict[str, Any] = msgspec.to_builtins(self.load)
        del loads["histograms"]
        return loads

    @property
    def max_num_seqs(self) -> int:
        """Maximum requests it runs at once."""
        return max(1, self.registration.max_num_seqs)

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        return self.registration.geometry.block_size

    @property
    def token_bytes(self) -> float:
        """Bytes of the KV of a token, over all layers."""
        return self.registration.geometry.block_bytes / self.block_size

    @property
    def num_requests(self) -> int:
        """Requests on it, including those of other routers."""
        return len(self.pending) + self._foreign_requests

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens it has still to compute, including those of other routers."""
        return sum(self.pending.values()) + self._foreign_tokens

    def tokens_before(self, num_tokens: int) -> int:
        """Return the number of prompt tokens it would compute before one more prompt of ``num_tokens``.

        These are all pending tokens, or with ``shortest_first`` those of prompts that are not longer. Later arrivals
        are not counted.
        """
        if self.registration.prefill_order != "shortest_first":
            return self.pending_tokens
        own = sum(pending for pending in self.pending.values() if pending <= num_tokens)
        return own + int(self._foreign_tokens * self._share_up_to(num_tokens))

    def added_wait(self, num_tokens: int) -> int:
        """Return the total wait that one more prompt of ``num_tokens`` adds, in tokens: its own and that of others.

        If prompts are computed in order of arrival, it delays no prompt already there.
        """
        return self.tokens_before(num_tokens) + num_tokens * self.num_delayed(num_tokens)

    def num_delayed(self, num_tokens: int) -> int:
        """Return how many prompts of this router are computed after one more of ``num_tokens``, which delays them."""
        if self.registration.prefill_order != "shortest_first":
            return 0
        return sum(pending > num_tokens for pending in self.pending.values())

    @property
    def num_prompts(self) -> int:
        """Prompts it has still to compute; those of other routers only if it does nothing but compute prompts."""
        num_own = sum(pending > 0 for pending in self.pending.values())
        return num_own + (self._foreign_requests if self.role is Role.PREFILL else 0)

    def _share_up_to(self, num_tokens: int) -> float:
        """Return the share of its reported queued tokens in the length classes up to that of ``num_tokens``."""
        by_length = self.load.prompt_tokens
        total = sum(by_length)
        return sum(by_length[: length_class(num_tokens) + 1]) / total if total else 1.0

    @property
    def spare_blocks(self) -> int:
        """KV blocks available at once to a request moved here: 0 if requests already wait for blocks here."""
        if not self.num_heartbeats or self.load.num_waiting or self.num_requests >= self.max_num_seqs:
            return 0
        return max(0, self._unclaimed_blocks)

    @property
    def prompt_blocks(self) -> int:
        """KV blocks for one more prompt, after all waiting requests have theirs. 0 if all slots are taken.

        0 also while preempted requests wait, because another prompt would delay them. Waiting prompts only add
        waiting time, which ``pending_tokens`` estimates.
        """
        load = self.load
        num_requests = load.num_waiting + load.num_running + load.num_receiving + self.num_given_requests
        if num_requests >= self.max_num_seqs or load.num_preempted:
            return 0
        # The last block of each waiting prompt may be partly filled.
        num_waiting_blocks = load.waiting_tokens // self.block_size + load.num_waiting
        return max(0, self._unclaimed_blocks - num_waiting_blocks)

    @property
    def _unclaimed_blocks(self) -> int:
        load = self.load
        return load.free_blocks + load.evictable_blocks - load.headroom_blocks - self.num_given_blocks

    def give(self, num_blocks: int) -> None:
        """Record that it was given a request that needs ``num_blocks`` blocks at once."""
        self.num_given_requests += 1
        self.num_given_blocks += num_blocks

    def take_load(self, load: Load) -> None:
        """Store the load that a heartbeat reports.

        This router's own requests are known exactly. The rest of the reported load is attributed to other routers.
        """
        self.load = load
        self.num_given_requests = self.num_given_blocks = 0
        num_requests = load.num_waiting + load.num_running + load.num_receiving
        self._foreign_requests = max(0, num_requests - len(self.pending))
        self._foreign_tokens = max(0, load.queued_tokens - sum(self.pending.values()))


MAX_RIVALS = 8
"""Registrations that wait for the name of one node."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A registration that waits since ``since_s`` for the name that a registered node has; repeated at ``heard_s``."""

    peer: PeerId
    registration: Register
    since_s: float
    heard_s: float


class NodeTable:
    """Nodes by peer, in the order of registration. All serve one model with one KV geometry.

    ``decode_alone``: decode nodes may compute prompts, so no prefill nodes are required. ``expected``: the only nodes
    that may register; None: all that match those registered.
    """

    def __init__(
        self,
        model: str,
        peer_timeout_s: float,
        *,
        decode_alone: bool = False,
        expected: Mapping[NodeId, ExpectedNode] | None = None,
    ) -> None:
        self.model = model
        self._expected = expected
        self._decode_alone = decode_alone
        self._peer_timeout_s = peer_timeout_s
        self._liveness = Liveness(peer_timeout_s)
        self._nodes: dict[PeerId, Node] = {}
        self._expecting_since_s = -math.inf
        self._rivals: dict[PeerId, dict[PeerId, Rival]] = {}
        """By the node whose name they want, in the order in which they were heard last."""
        self.totals = NodeTotals()

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, peer: PeerId | None) -> Node | None:
        """Return the registered node of ``peer``, or None."""
        return None if peer is None else self._nodes.get(peer)

    def named(self, node_id: NodeId) -> Node | None:
        """Return the node with this name, or None."""
        return next((node for node in self if node.node_id == node_id), None)

    def available(self, *roles: Role) -> list[Node]:
        """Return the nodes of these roles that accept new requests."""
        return [node for node in self if node.role in roles and not node.leaving]

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence in tokens that every node can serve; None without nodes."""
        return min((node.registration.max_model_len for node in self), default=None)

    def can_serve(self, roles: Set[Role]) -> bool:
        """Return whether nodes of ``roles`` together can serve a request."""
        with_decode = Role.DECODE in roles and (Role.PREFILL in roles or self._decode_alone)
        return with_decode or Role.MIXED in roles

    def unready_reason(self) -> str | None:
        """Return why no request can be served now, or None."""
        if self.can_serve({node.role for node in self if not node.leaving}):
            return None
        missing = [role.value for role in (Role.PREFILL, Role.DECODE) if not self.available(role)]
        return f"no {' and no '.join(missing)} node is registered, and no mixed node"

    # ------------------------------------------------------------ registration

    def mismatch(self, peer: PeerId, registration: Register) -> str | None:
        """Return why this registration must be refused, or None."""
        if peer != peer_id(registration.node_id, registration.incarnation):
            return f"{registration.node_id} registers over the connection of {peer}"
        if registration.role not in list(Role):
            return f"unknown role {registration.role!r}"
        if registration.geometry.protocol_version != PROTOCOL_VERSION:
            return f"protocol version {registration.geometry.protocol_version}, the router's is {PROTOCOL_VERSION}"
        if registration.model != self.model:
            return f"model {registration.model!r}, the cluster serves {self.model!r}"
        return self._difference_from_config(registration) or self._difference_from_others(registration)

    def _difference_from_config(self, registration: Register) -> str | None:
        if self._expected is None:
            return None
        expected = self._expected.get(registration.node_id)
        if expected is None:
            return f"the router's config has no node {registration.node_id}"
        return expected.problem_with(registration)

    def _difference_from_others(self, registration: Register) -> str | None:
        for node in self:
            if node.node_id != registration.node_id:
                differences = node.registration.geometry.differences(registration.geometry)
                return f"KV geometry differs from {node.node_id}'s: {'; '.join(differences)}" if differences else None
        return None

    def rival(self, registration: Register) -> Node | None:
        """Return the registered node with the same name and another incarnation, or None."""
        node = self.named(registration.node_id)
        return node if node is not None and node.registration.incarnation != registration.incarnation else None

    def contest(self, holder: Node, peer: PeerId, registration: Register, now: float) -> None:
        """Defer ``registration`` until ``holder``, which has the same name, is known to be alive or is lost.

        Each of several rivals waits for itself. Beyond ``MAX_RIVALS`` it is ignored: who waits registers again.
        """
        rivals = self._rivals.setdefault(holder.peer, {})
        for gone in [rival.peer for rival in rivals.values() if not self._is_heard(rival, now)]:
            del rivals[gone]
        earlier = rivals.pop(peer, None)
        if len(rivals) < MAX_RIVALS:
            rivals[peer] = Rival(peer, registration, earlier.since_s if earlier is not None else now, now)

    def beaten_by(self, holder: PeerId, now: float) -> list[Rival]:
        """Remove and return those that wait for the name of ``holder``, which has sent a heartbeat, if that proves it
        alive.

        It may be an old heartbeat of a process that has ended since: one connection is read after the other, and after
        a pause there is much to read. What is read half of ``peer_timeout_s`` later was sent later.
        """
        rivals = self._rivals.get(holder, {})
        beaten = [rival for rival in rivals.values() if now - rival.since_s >= self._peer_timeout_s / 2]
        for rival in beaten:
            del rivals[rival.peer]
        return beaten

    def heir_of(self, holder: PeerId, now: float) -> Rival | None:
        """Forget all that wait for the name of ``holder``, which is lost. Return the one that registered last, unless
        it has fallen silent itself: the others will register again, and wait for the heir.
        """
        rivals = self._rivals.pop(holder, {})
        return next((rival for rival in reversed(rivals.values()) if self._is_heard(rival, now)), None)

    def _is_heard(self, rival: Rival, now: float) -> bool:
        return now - rival.heard_s < self._peer_timeout_s

    def add(self, peer: PeerId, registration: Register, now: float) -> Node:
        """Add a node, or update the registration of a known one."""
        node = self._nodes.setdefault(peer, Node(peer, registration))
        node.registration = registration
        self._liveness.watch(peer, now)
        self._liveness.record_message(peer, now)
        return node

    def take_load(self, node: Node, load: Load) -> None:
        """Store the load that a heartbeat of ``node`` reports, and count what it has counted since the last one."""
        if node.num_heartbeats:
            self.totals.add_growth(node.load, load)
        node.take_load(load)

    # ------------------------------------------------------------ liveness and removal

    def expect_nodes(self, now: float) -> None:
        """Note that nodes may register soon: this router has just started, or a node that left is being restarted."""
        self._expecting_since_s = now

    def record_message(self, peer: PeerId, now: float) -> None:
        """Record a message from ``peer``: any message counts as a heartbeat."""
        self._liveness.record_message(peer, now)

    def resumed(self, paused_s: float, now: float) -> None:
        """This process did not run for ``paused_s``: no node is to blame for its silence, and no heartbeat is new."""
        self._liveness.resumed(paused_s, now)
        for rivals in self._rivals.values():
            for peer, rival in rivals.items():
                rivals[peer] = replace(rival, since_s=now, heard_s=now)

    def silent(self, now: float) -> list[PeerId]:
        """Return the nodes that sent nothing for ``peer_timeout_s``."""
        return self._liveness.lost(now)

    def remove(self, peer: PeerId, now: float) -> Node | None:
        """Remove a node; return it, or None if it was not registered. It waits for no name any more."""
        for rivals in self._rivals.values():
            rivals.pop(peer, None)
        self._liveness.forget(peer)
        node = self._nodes.pop(peer, None)
        if node is not None:
            self.expect_nodes(now)
        return node

    def may_come(self, now: float, within_s: float) -> bool:
        """Return whether a node is leaving, or ``expect_nodes`` was called at most ``within_s`` ago."""
        return any(node.leaving for node in self) or now - self._expecting_since_s <= within_s
