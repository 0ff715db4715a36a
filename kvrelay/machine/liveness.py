"""Heartbeats: when the last message of each peer arrived, and when this process itself did not run."""

from __future__ import annotations

import math

from kvrelay.protocol.ids import PeerId

TICK_S = 0.25
"""How often a process that has nothing to do notes that it runs."""

PAUSE_S = 1.0
"""A process that did not run for this long was paused: it has not read what peers sent."""

MAX_PAUSES = 5
"""Pauses in a row that count as no silence of a peer. A peer not heard between so many is silent, not unread."""

READ_FIRST_S = 0.1
"""How long after a pause messages are read before timers fire."""


class Liveness:
    """Peers and when the last message of each arrived."""

    def __init__(self, peer_timeout_s: float) -> None:
        self.peer_timeout_s = peer_timeout_s
        self._last_message_s: dict[PeerId, float] = {}
        self._unheard_pauses: dict[PeerId, int] = {}
        """Pauses since the last message of a peer, for peers with any."""

    @property
    def peers(self) -> list[PeerId]:
        """The peers that are watched, in the order in which that began."""
        return list(self._last_message_s)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._last_message_s

    def watch(self, peer: PeerId, now: float) -> None:
        """Expect messages from ``peer`` from ``now`` on. Has no effect on a peer that is watched already."""
        self._last_message_s.setdefault(peer, now)

    def record_message(self, peer: PeerId, now: float) -> None:
        """Note that a message of ``peer`` arrived, if it is watched."""
        if peer in self._last_message_s:
            self._last_message_s[peer] = now
            if self._unheard_pauses:
                self._unheard_pauses.pop(peer, None)

    def forget(self, peer: PeerId) -> None:
        """Stop watching ``peer``."""
        self._last_message_s.pop(peer, None)
        self._unheard_pauses.pop(peer, None)

    def resumed(self, paused_s: float, now: float) -> None:
        """Count no silence for the last ``paused_s``, in which this process did not run and could hear nobody.

        A loop that is slow again and again would never find a dead peer, so each is excused ``MAX_PAUSES`` in a row.
        """
        for peer, last_message_s in self._last_message_s.items():
            num_pauses = self._unheard_pauses.get(peer, 0)
            if num_pauses < MAX_PAUSES:
                self._unheard_pauses[peer] = num_pauses + 1
                self._last_message_s[peer] = min(now, last_message_s + paused_s)

    def lost(self, now: float) -> list[PeerId]:
        """Return the peers silent for ``peer_timeout_s``, and forget them."""
        lost = [
            peer for peer, last_message_s in self._last_message_s.items() if now - last_message_s >= self.peer_timeout_s
        ]
        for peer in lost:
            self.forget(peer)
        return lost


class Pauses:
    """Finds the times in which this process did not run, by a clock that goes on meanwhile.

    ``ran`` must be called at least every ``TICK_S`` while it runs.
    """

    def __init__(self, now: float) -> None:
        self._ran_s = now
        self._resumed_s = -math.inf
        self._untold_s = 0.0

    def ran(self, now: float) -> None:
        """Note that this process runs at ``now``."""
        gap_s, self._ran_s = now - self._ran_s, now
        if gap_s >= PAUSE_S:
            self._untold_s += gap_s
            self._resumed_s = now

    def take(self, now: float) -> float:
        """Return the seconds of the pauses that ended by ``now`` and were not returned before; usually 0."""
        self.ran(now)
        paused_s, self._untold_s = self._untold_s, 0.0
        return paused_s

    def reading_s(self, now: float) -> float:
        """Return for how many seconds from ``now`` timers wait because unread messages come first; usually 0."""
        self.ran(now)
        return max(0.0, self._resumed_s + READ_FIRST_S - now)
