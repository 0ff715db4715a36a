"""Ids of blocks, sequences, nodes, peers and attempts."""

from __future__ import annotations

import secrets
from typing import NamedTuple, NewType

BlockId = NewType("BlockId", int)
"""Index of a KV block in one node's pool."""

RequestId = NewType("RequestId", str)
"""Id of a request, from the router. It is the same on all nodes and for all attempts."""

SequenceId = NewType("SequenceId", int)
"""Id of a sequence in a node's engine. A request gets a new one each time it gets blocks on the node and runs."""

NodeId = NewType("NodeId", str)
"""Name of a node in the config, e.g. ``d0``."""

PeerId = NewType("PeerId", str)
"""Id of one process: ``name#incarnation``. A restarted process is another peer."""

ROUTER = PeerId("router")
"""Peer id of a node's router with a static registry, for all its incarnations."""

MESSAGER = PeerId("messager")
"""Peer id of a node's own cache messager."""


class Attempt(NamedTuple):
    """One attempt at a request: the key of every reservation, transfer and answer.

    The router raises ``epoch`` for each attempt, so that messages and frames of earlier attempts can be dropped.
    """

    request_id: RequestId
    epoch: int


def new_incarnation() -> str:
    """Return a random id for one start of a process."""
    return secrets.token_hex(4)


def peer_id(name: str, incarnation: str) -> PeerId:
    """Return the peer id of an incarnation of ``name``."""
    return PeerId(f"{name}#{incarnation}")


def messager_of(node: PeerId) -> PeerId:
    """Return the peer id of the cache messager of ``node``."""
    name, _, incarnation = node.partition("#")
    return peer_id(f"{name}.messager", incarnation)


def node_of(messager: PeerId) -> PeerId:
    """Return the peer id of the node of ``messager``."""
    name, _, incarnation = messager.partition("#")
    return peer_id(name.removesuffix(".messager"), incarnation)


def peer_name(peer: PeerId) -> str:
    """Return the name in ``peer``, without the incarnation."""
    return peer.partition("#")[0]
