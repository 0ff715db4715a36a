"""The router's copy of the prefix cache of one node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvrelay.protocol.block_hash import PREFIX_KEY_BYTES
from kvrelay.protocol.messages.node_to_router import PrefixCacheChanged

EXPECTED_HEARTBEATS = 30
"""Heartbeats after which a prompt sent to a node no longer counts as cached there unless the node has reported it."""


class NodePrefixes:
    """Prefix keys of the blocks that a node has published, and of prompts sent to it that it will publish.

    A node evicts a block only after all its continuations. So if a key is present, the keys before it are too, and the
    longest cached prefix is found by bisection. If a reported change is late, a match is too long or too short. That
    costs time, never a wrong token: nodes match whole hashes themselves. ``reported`` are the keys of published blocks.
    """

    __slots__ = ("_expected", "_num_heartbeats", "_number", "_reports", "reported")

    def __init__(self) -> None:
        self.reported: set[bytes] = set()
        self._expected: dict[bytes, int] = {}
        self._number = 0
        self._reports = False
        self._num_heartbeats = 0

    def take(self, message: PrefixCacheChanged) -> bool:
        """Apply a report. Return False, and know nothing any more, if one before it is missing."""
        self._reports = True
        if message.number == 0:
            self.reported = set()
        elif message.number != self._number:
            self.reported, self._number = set(), 0
            return False
        self._number = message.number + 1
        added = set(_split(message.added))
        self.reported |= added
        self.reported.difference_update(_split(message.removed))
        for key in added.intersection(self._expected):
            del self._expected[key]
        return True

    def expect(self, keys: Sequence[bytes]) -> None:
        """Record that a prompt with these ``keys`` was sent to the node. One that reports nothing caches nothing."""
        for key in keys if self._reports else ():
            if key not in self.reported:
                self._expected.pop(key, None)  # the dictionary stays in order of age
                self._expected[key] = self._num_heartbeats

    def clear(self) -> None:
        """Know of nothing that is in the node's prefix cache, or will be."""
        self.reported = set()
        self._expected.clear()

    def count_heartbeat(self) -> None:
        """Forget what was expected ``EXPECTED_HEARTBEATS`` ago."""
        self._num_heartbeats += 1
        oldest = self._num_heartbeats - EXPECTED_HEARTBEATS
        while self._expected and (key := next(iter(self._expected))) and self._expected[key] < oldest:
            del self._expected[key]

    def num_cached_blocks(self, keys: Sequence[bytes]) -> int:
        """Return how many of the first blocks of a prompt with these ``keys`` the node has or will have."""
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            if keys[middle] in self.reported or keys[middle] in self._expected:
                low = middle + 1
            else:
                high = middle
        return low


def _split(keys: bytes) -> Iterator[bytes]:
    return (keys[start : start + PREFIX_KEY_BYTES] for start in range(0, len(keys), PREFIX_KEY_BYTES))
