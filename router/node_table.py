"""The nodes that may be given work, and how they come and go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvrelay.config.cluster_config import Role
from kvrelay.machine.liveness import Liveness
from kvrelay.protocol.geometry import PROTOCOL_VERSION
from kvrelay.protocol.ids import NodeId, PeerId, peer_id
from kvrelay.protocol.messages.base import Load, NodeAddress
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.prompt_lengths import length_class


@dataclass(slots=True, eq=False)
class Node:
    """A registered node. ``pending``: its requests of this router, with the prompt tokens each must yet compute.

    ``load`` is what its last heartbeat said, of which there were ``num_heartbeats`` so far; since then it was given
    ``num_given_requests`` that need ``num_given_blocks``: preempted ones, and prompts for a decode node to compute.
    """

    peer: PeerId
    registration: Register
    load: Load = field(default_factory=Load)
    num_heartbeats: int = 0
    num_given_requests: int = 0
    num_given_blocks: int = 0
    leaving: bool = False
    pending: dict[str, int] = field(default_factory=dict)
    _foreign_requests: int = 0
    _foreign_tokens: int = 0

    @property
    def node_id(self) -> NodeId:
        """Its name in the config."""
        return self.registration.node_id

    @property
    def role(self) -> Role:
        """What it does."""
        return Role(self.registration.role)

    @property
    def address(self) -> NodeAddress:
        """Where another node reaches it."""
        return NodeAddress(peer=self.peer, address=self.registration.address)

    def load_as_dict(self) -> dict[str, Any]:
        """Return what it last said of its load."""
        loads: dict[str, Any] = msgspec.to_builtins(self.load)
        return loads

    @property
    def max_num_seqs(self) -> int:
        """How many requests it may run at once."""
        return max(1, self.registration.max_num_seqs)

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        return self.registration.geometry.block_size

    @property
    def num_requests(self) -> int:
        """Requests on it, those of other routers too."""
        return len(self.pending) + self._foreign_requests

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens it must yet compute, likewise."""
        return sum(self.pending.values()) + self._foreign_tokens

    def tokens_before(self, num_tokens: int) -> int:
        """Return how many prompt tokens it would compute before those of one more prompt of ``num_tokens``.

        Those of all prompts it has, or, if it computes the shortest first, of prompts that are no longer. What prompts
        to come will add is not known.
        """
        if self.registration.prefill_order != "shortest_first":
            return self.pending_tokens
        own = sum(pending for pending in self.pending.values() if pending <= num_tokens)
        return own + int(self._foreign_tokens * self._share_up_to(num_tokens))

    def added_wait(self, num_tokens: int) -> int:
        """Return for how many tokens' time one more prompt of ``num_tokens`` waits here, and makes others wait, in all.

        Where prompts are computed in order of arrival it makes no prompt wait that is there.
        """
        if self.registration.prefill_order != "shortest_first":
            return self.pending_tokens
        num_longer = sum(pending > num_tokens for pending in self.pending.values())
        return self.tokens_before(num_tokens) + num_tokens * num_longer

    def _share_up_to(self, num_tokens: int) -> float:
        """Return the share that prompts in the class of ``num_tokens`` and below have in the tokens it tells of."""
        by_length = self.load.prompt_tokens
        total = sum(by_length)
        return sum(by_length[: length_class(num_tokens) + 1]) / total if total else 1.0

    @property
    def spare_blocks(self) -> int:
        """KV blocks that a request from elsewhere could have at once: none if others wait for blocks there."""
        if not self.num_heartbeats or self.load.num_waiting or self.num_requests >= self.max_num_seqs:
            return 0
        return max(0, self._unclaimed_blocks)

    @property
    def prompt_blocks(self) -> int:
        """KV blocks for one more prompt, after all waiting requests have theirs. 0 if all slots are taken.

        0 also while preempted requests wait, because another prompt would delay them. Waiting prompts only add to the
        wait, which ``pending_tokens`` estimates.
        """
        load = self.load
        num_requests = load.num_waiting + load.num_running + load.num_receiving + self.num_given_requests
        if num_requests >= self.max_num_seqs or load.num_preempted:
            return 0
        # Each of those that wait may begin one block more than their tokens fill.
        num_waiting_blocks = load.waiting_tokens // self.block_size + load.num_waiting
        return max(0, self._unclaimed_blocks - num_waiting_blocks)

    @property
    def _unclaimed_blocks(self) -> int:
        load = self.load
        return load.free_blocks + load.evictable_blocks - load.headroom_blocks - self.num_given_blocks

    def give(self, num_blocks: int) -> None:
        """Note that it gets a request that needs so many blocks at once."""
        self.num_given_requests += 1
        self.num_given_blocks += num_blocks

    def take_load(self, load: Load) -> None:
        """Take the load that a heartbeat reports.

        The requests of this router are known exactly, and at once. What the node has beyond them is other routers'.
        """
        self.load = load
        self.num_given_requests = self.num_given_blocks = 0
        num_requests = load.num_waiting + load.num_running + load.num_receiving
        self._foreign_requests = max(0, num_requests - len(self.pending))
        self._foreign_tokens = max(0, load.queued_tokens - sum(self.pending.values()))


class NodeTable:
    """Nodes by peer, in the order they registered. All serve one model with one KV geometry.

    ``decode_alone``: decode nodes may compute prompts, so they can do without prefill nodes.
    """

    def __init__(self, model: str, peer_timeout_s: float, *, decode_alone: bool = False) -> None:
        self._model = model
        self._decode_alone = decode_alone
        self._liveness = Liveness(peer_timeout_s)
        self._nodes: dict[PeerId, Node] = {}
        self._last_departure_s = -math.inf
        self._rivals: dict[PeerId, tuple[PeerId, Register]] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, peer: PeerId | None) -> Node | None:
        """Return the node that ``peer`` is, if it is registered."""
        return None if peer is None else self._nodes.get(peer)

    def named(self, node_id: NodeId) -> Node | None:
        """Return the node with this name."""
        return next((node for node in self if node.node_id == node_id), None)

    def available(self, *roles: Role) -> list[Node]:
        """Return the nodes of these roles that take new work."""
        return [node for node in self if node.role in roles and not node.leaving]

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence every node can serve, if there is a node."""
        return min((node.registration.max_model_len for node in self), default=None)

    def can_serve(self, roles: Set[Role]) -> bool:
        """Tell whether nodes of ``roles`` together can serve a request."""
        with_decode = Role.DECODE in roles and (Role.PREFILL in roles or self._decode_alone)
        return with_decode or Role.MIXED in roles

    def unready_reason(self) -> str | None:
        """Return why no request could be served now, or None."""
        if self.can_serve({node.role for node in self if not node.leaving}):
            return None
        missing = [role.value for role in (Role.PREFILL, Role.DECODE) if not self.available(role)]
        return f"no {' and no '.join(missing)} node is registered, nor a mixed one"

    # ------------------------------------------------------------ coming

    def mismatch(self, peer: PeerId, registration: Register) -> str | None:
        """Return why this node must not join, or None."""
        if peer != peer_id(registration.node_id, registration.incarnation):
            return f"{registration.node_id} registers over the connection of {peer}"
        if registration.role not in list(Role):
            return f"unknown role {registration.role!r}"
        if registration.geometry.protocol_version != PROTOCOL_VERSION:
            return f"protocol version {registration.geometry.protocol_version}, the router's is {PROTOCOL_VERSION}"
        if registration.model != self._model:
            return f"model {registration.model!r}, the cluster serves {self._model!r}"
        for node in self:
            if node.node_id != registration.node_id:
                differences = node.registration.geometry.differences(registration.geometry)
                return f"KV geometry differs from {node.node_id}'s: {'; '.join(differences)}" if differences else None
        return None

    def rival(self, registration: Register) -> Node | None:
        """Return the registered node that has this name and another incarnation."""
        node = self.named(registration.node_id)
        return node if node is not None and node.registration.incarnation != registration.incarnation else None

    def contest(self, holder: Node, peer: PeerId, registration: Register) -> None:
        """Let ``registration`` wait until ``holder``, which has its name, sends something or is lost."""
        self._rivals[holder.peer] = (peer, registration)

    def settle(self, holder: PeerId) -> tuple[PeerId, Register] | None:
        """Return the node that waits for the name of ``holder``, with its registration, and forget it."""
        return self._rivals.pop(holder, None)

    def add(self, peer: PeerId, registration: Register, now: float) -> Node:
        """Take a node in, or note that it registered again."""
        node = self._nodes.setdefault(peer, Node(peer, registration))
        node.registration = registration
        self._liveness.watch(peer, now)
        self._liveness.heard(peer, now)
        return node

    # ------------------------------------------------------------ staying and going

    def heard(self, peer: PeerId, now: float) -> None:
        """Note that ``peer`` sent something: any message counts as a heartbeat."""
        self._liveness.heard(peer, now)

    def silent(self, now: float) -> list[PeerId]:
        """Return the nodes not heard of for too long."""
        return self._liveness.lost(now)

    def remove(self, peer: PeerId, now: float) -> Node | None:
        """Forget a node; return it if it was there."""
        self._liveness.forget(peer)
        node = self._nodes.pop(peer, None)
        if node is not None:
            self._last_departure_s = now
        return node

    def may_come_back(self, now: float, within_s: float) -> bool:
        """Tell whether a node is leaving, or left at most ``within_s`` ago: it is probably being restarted."""
        return any(node.leaving for node in self) or now - self._last_departure_s <= within_s
