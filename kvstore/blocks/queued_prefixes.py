"""Tracks how many blocks of each queued prompt the prefix cache has, without matching all of them repeatedly."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache


class Hashed(Hashable, Protocol):
    """A request whose blocks may be replaced by published ones with ``reusable_hashes``, in order."""

    @property
    def reusable_hashes(self) -> list[bytes]:
        """The chained hashes of its first full blocks."""


R = TypeVar("R", bound=Hashed)


class QueuedPrefixes(Generic[R]):
    """When the first block that a queued request lacks is published, the request is matched again.

    ``changed`` is called for every request whose number of matched blocks has changed. Evictions are not tracked: call
    ``match`` again before using the blocks.
    """

    def __init__(self, kv: KVCache, changed: Callable[[R, int], None]) -> None:
        self._kv = kv
        self._changed = changed
        self._num_matched: dict[R, int] = {}
        self._lacking: dict[bytes, dict[R, None]] = {}

    def add(self, request: R) -> int:
        """Track ``request``; return the number of matched blocks."""
        return self._note(request, self._kv.match(request.reusable_hashes))

    def remove(self, request: R) -> None:
        """Stop tracking ``request``, if it is tracked."""
        self._forget_lacking(request)
        self._num_matched.pop(request, None)

    def lacks(self, request: R) -> bytes | None:
        """Return the hash of the first full block of ``request`` that is not published, as of the last match."""
        num_matched, hashes = self._num_matched[request], request.reusable_hashes
        return hashes[num_matched] if num_matched < len(hashes) else None

    def match(self, request: R) -> list[BlockId]:
        """Return the published blocks of ``request``."""
        matched = self._kv.match(request.reusable_hashes)
        before = self._num_matched[request]
        if len(matched) != before:
            self._forget_lacking(request)
            self._changed(request, self._note(request, matched))
        return matched

    def published(self, hashes: Iterable[bytes]) -> None:
        """Record that blocks of ``hashes`` are published."""
        if not self._lacking:
            return
        for block_hash in hashes:
            if block_hash in self._lacking:
                for request in list(self._lacking[block_hash]):
                    self.match(request)

    def _note(self, request: R, matched: Sequence[BlockId]) -> int:
        num_matched = self._num_matched[request] = len(matched)
        lacking = self.lacks(request)
        if lacking is not None:
            self._lacking.setdefault(lacking, {})[request] = None
        return num_matched

    def _forget_lacking(self, request: R) -> None:
        lacking = self.lacks(request) if request in self._num_matched else None
        if lacking is not None:
            followers = self._lacking[lacking]
            del followers[request]
            if not followers:
                del self._lacking[lacking]
