"""The nodes that a router has found in the registry and reached out to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvrelay.machine.contract import Connect, Disconnect, Log
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.registry.node_entry import NodeEntry, present
from router.events import RouterOutbox


class FollowedNodes:
    """Connections to the nodes in the registry, one for each entry. ``NodeTable`` knows which of them are registered.

    The registry has only addresses. Role, load and liveness come over the connections, so nothing is lost when the
    registry is unavailable. ``problem`` says why it cannot be read at present.
    """

    def __init__(self, model: str, outbox: RouterOutbox) -> None:
        self._model = model
        self._outbox = outbox
        self._entries: dict[PeerId, NodeEntry] = {}
        self._foreign: set[PeerId] = set()
        self.problem: str | None = None

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._entries

    def take(self, entries: Iterable[NodeEntry], *, registered: Callable[[PeerId], bool]) -> list[PeerId]:
        """Reach out to those that are new in ``entries``; return the peers that a later start has replaced.

        A node whose entry has vanished is let go unless it is ``registered``: that one is alive, and only the registry
        has lost it.
        """
        wanted = {entry.peer: entry for entry in present(self._ours(entries))}
        addresses = {entry.address: entry.peer for entry in wanted.values()}
        replaced = [peer for peer, entry in self._entries.items() if addresses.get(entry.address, peer) != peer]
        for peer in replaced:
            self.forget(peer)
        for peer in [peer for peer in self._entries if peer not in wanted and not registered(peer)]:
            self.forget(peer)
        for peer, entry in wanted.items():
            if peer not in self._entries:
                self._outbox.do(Log("info", "node found", {"node": peer, "address": entry.address}))
                self._outbox.do(Connect(peer, entry.address))
                self._outbox.send(peer, Heartbeat())
            self._entries[peer] = entry
        return replaced

    def forget(self, peer: PeerId) -> None:
        """Drop the connection to ``peer``. If its entry is there when the registry is read again, so is the node."""
        if self._entries.pop(peer, None) is not None:
            self._outbox.do(Disconnect(peer))

    def is_draining(self, peer: PeerId) -> bool:
        """Tell whether the registry says that ``peer`` takes nothing new."""
        entry = self._entries.get(peer)
        return entry is not None and entry.is_draining

    def beat(self) -> None:
        """Send every node a heartbeat; those that do not know this router answer with a Register."""
        for peer in self._entries:
            self._outbox.send(peer, Heartbeat())

    def _ours(self, entries: Iterable[NodeEntry]) -> list[NodeEntry]:
        """Leave out the nodes of other clusters that are in the same registry by mistake."""
        ours = []
        for entry in entries:
            if entry.registration.model == self._model:
                ours.append(entry)
            elif entry.peer not in self._foreign:
                self._foreign.add(entry.peer)
                fields: dict[str, object] = {"node": entry.peer, "model": entry.registration.model}
                self._outbox.do(Log("warning", "node of another model in the registry", fields))
        return ours
