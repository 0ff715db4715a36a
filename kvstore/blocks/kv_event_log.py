"""What the prefix cache has published and removed, as KV events, until the node's machine takes them."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, event_hashes


class KVEventLog:
    """The events since the last ``take``, oldest first. ``block_size`` is in tokens."""

    __slots__ = ("_block_size", "_events")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._events: list[KVEvent] = []

    def __len__(self) -> int:
        return len(self._events)

    def stored(self, hashes: Sequence[bytes], first: int, token_ids: Sequence[int]) -> None:
        """Note that the blocks from number ``first`` of a sequence with these hashes and tokens are published."""
        parent = event_hashes(hashes[first - 1 : first])[0] if first else None
        tokens = list(token_ids[first * self._block_size : len(hashes) * self._block_size])
        self._events.append(BlockStored(event_hashes(hashes[first:]), parent, tokens, self._block_size))

    def removed(self, hashes: Sequence[bytes]) -> None:
        """Note that blocks are not published any more."""
        self._events.append(BlockRemoved(event_hashes(hashes)))

    def cleared(self) -> None:
        """Note that nothing is published."""
        self._events.append(AllBlocksCleared())

    def take(self) -> list[KVEvent]:
        """Return the events and begin anew."""
        events, self._events = self._events, []
        return events
