"""Heartbeats: the part of a machine that notes when each peer was heard."""

from __future__ import annotations

from kvrelay.protocol.ids import PeerId


class Liveness:
    """Peers and when each was last heard. Any message counts."""

    def __init__(self, peer_timeout_s: float) -> None:
        self.peer_timeout_s = peer_timeout_s
        self._heard_s: dict[PeerId, float] = {}

    @property
    def peers(self) -> list[PeerId]:
        """The peers that are watched, in the order in which that began."""
        return list(self._heard_s)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._heard_s

    def watch(self, peer: PeerId, now: float) -> None:
        """Expect messages from ``peer`` from ``now`` on. Has no effect on a peer that is watched already."""
        self._heard_s.setdefault(peer, now)

    def heard(self, peer: PeerId, now: float) -> None:
        """Note that ``peer`` was heard, if it is watched."""
        if peer in self._heard_s:
            self._heard_s[peer] = now

    def forget(self, peer: PeerId) -> None:
        """Stop watching ``peer``."""
        self._heard_s.pop(peer, None)

    def lost(self, now: float) -> list[PeerId]:
        """Return the peers not heard for ``peer_timeout_s``, and forget them."""
        lost = [peer for peer, heard_s in self._heard_s.items() if now - heard_s >= self.peer_timeout_s]
        for peer in lost:
            del self._heard_s[peer]
        return lost
