"""What peers are called on the wire: the ROUTING_ID of a ZMQ connection, and which peer a connection may speak for."""

from __future__ import annotations

import secrets
from collections import OrderedDict

from kvrelay.protocol.ids import PeerId

MAX_PEERS = 16384
"""Maximum number of remembered peers that connect to us. The one that was silent for longest is forgotten."""

_SEPARATOR = "/"


class PeerNames:
    """Routing ids of this process, and of the peers that connect to it.

    A ROUTER lets a new connection take the place of an earlier one with the same routing id, so that a peer can
    reconnect, at another address too. A routing id is therefore a peer id and a secret of that process, which only its
    peers know: no stranger can take its place. The first connection that uses a peer id keeps it. Peer ids are never
    used again, because they contain the incarnation.
    """

    def __init__(self, me: PeerId) -> None:
        self.own_routing_id = f"{me}{_SEPARATOR}{secrets.token_hex(12)}".encode()
        self._by_routing_id: OrderedDict[bytes, PeerId] = OrderedDict()
        self._by_peer: dict[PeerId, bytes] = {}

    def __len__(self) -> int:
        return len(self._by_peer)

    def routing_id(self, peer: PeerId) -> bytes | None:
        """Return the routing id of ``peer``, which connects to us, or None if it has not been heard."""
        return self._by_peer.get(peer)

    def peer(self, routing_id: bytes) -> PeerId | None:
        """Return the peer that sent a message over a connection; None if another connection has its peer id."""
        peer = self._by_routing_id.get(routing_id)
        if peer is not None:
            self._by_routing_id.move_to_end(routing_id)
            return peer
        peer = claimed_peer(routing_id)
        if peer in self._by_peer:
            return None
        self._by_routing_id[routing_id] = peer
        self._by_peer[peer] = routing_id
        if len(self._by_peer) > MAX_PEERS:
            _, forgotten = self._by_routing_id.popitem(last=False)
            del self._by_peer[forgotten]
        return peer


def claimed_peer(routing_id: bytes) -> PeerId:
    """Return the peer id that ``routing_id`` begins with."""
    return PeerId(routing_id.decode("utf-8", "replace").partition(_SEPARATOR)[0])
