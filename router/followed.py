"""Connections to the nodes found in the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from kvrelay.machine.contract import Connect, Disconnect, Log
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.registry.node_entry import NodeEntry, present
from router.events import RouterOutbox


class FollowedNodes:
    """Connections to the nodes in the registry, one per entry. ``NodeTable`` holds those that have registered.

    The registry has only addresses. Role, load and liveness come over the connections, so nothing is lost when the
    registry is unavailable. Meanwhile the nodes that it last had are called again and again, whoever was lost, and a
    node that answers as another start of itself is called by its new name. ``problem``: why the registry cannot be read
    now, or None.
    """

    def __init__(self, model: str, outbox: RouterOutbox) -> None:
        self._model = model
        self._outbox = outbox
        self._entries: dict[PeerId, NodeEntry] = {}
        self._last_read: list[NodeEntry] = []
        self._foreign: set[PeerId] = set()
        self.problem: str | None = None

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._entries

    def take(self, entries: Iterable[NodeEntry], *, registered: Callable[[PeerId], bool]) -> list[PeerId]:
        """Connect to the new nodes in ``entries``; return the peers replaced by a later start at the same address.

        Nodes without an entry are disconnected unless ``registered``: a registered node is alive, and only its registry
        entry is lost.
        """
        self.problem = None
        self._last_read = present(self._ours(entries))
        wanted = {entry.peer: entry for entry in self._last_read}
        addresses = {entry.address: entry.peer for entry in wanted.values()}
        replaced = [peer for peer, entry in self._entries.items() if addresses.get(entry.address, peer) != peer]
        for peer in replaced:
            self.forget(peer)
        for peer in [peer for peer in self._entries if peer not in wanted and not registered(peer)]:
            self.forget(peer)
        for peer, entry in wanted.items():
            if peer not in self._entries:
                self._outbox.do(Log("info", "node found", {"node": peer, "address": entry.address}))
                self._call(entry)
            self._entries[peer] = entry
        return replaced

    def _call(self, entry: NodeEntry) -> None:
        self._entries[entry.peer] = entry
        self._outbox.do(Connect(entry.peer, entry.address))
        self._outbox.send(entry.peer, Heartbeat())

    def registry_lost(self, reason: str) -> None:
        """The registry cannot be read: call every node that it last had, those given up since then too."""
        if self.problem is None:
            called = {entry.address for entry in self._entries.values()}
            for entry in self._last_read:
                if entry.address not in called:
                    self._call(entry)
        self.problem = reason

    def forget(self, peer: PeerId) -> None:
        """Drop the connection to ``peer``. It is made again if the next read of the registry has its entry.

        It is made again at once while the registry cannot be read.
        """
        entry = self._entries.pop(peer, None)
        if entry is None:
            return
        self._outbox.do(Disconnect(peer))
        if self.problem is not None:
            self._call(entry)

    def answered_by_another(self, peer: PeerId, other: Register) -> None:
        """Drop the connection to ``peer``, at whose address ``other`` answers.

        If that is a later start of the same node, and the registry cannot tell so now, call it by its name.
        """
        entry = self._entries.pop(peer)
        self._outbox.do(Disconnect(peer))
        known = entry.registration
        same = (other.node_id, other.model, other.address) == (known.node_id, known.model, known.address)
        if self.problem is not None and same:
            self._call(msgspec.structs.replace(entry, registration=other))

    def is_draining(self, peer: PeerId) -> bool:
        """Return whether the registry marks ``peer`` as draining."""
        entry = self._entries.get(peer)
        return entry is not None and entry.is_draining

    def beat(self) -> None:
        """Send every node a heartbeat. Nodes that do not know this router answer with Register."""
        for peer in self._entries:
            self._outbox.send(peer, Heartbeat())

    def _ours(self, entries: Iterable[NodeEntry]) -> list[NodeEntry]:
        """Return the entries for this model; log each node of another model once while it is there."""
        ours: list[NodeEntry] = []
        foreign: set[PeerId] = set()
        for entry in entries:
            if entry.registration.model == self._model:
                ours.append(entry)
                continue
            foreign.add(entry.peer)
            if entry.peer not in self._foreign:
                fields: dict[str, object] = {"node": entry.peer, "model": entry.registration.model}
                self._outbox.do(Log("warning", "node of another model in the registry", fields))
        self._foreign = foreign
        return ours
