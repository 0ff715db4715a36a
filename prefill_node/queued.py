"""The requests of a prefill node that have no blocks yet."""

from __future__ import annotations

from collections.abc import Iterator

from kvrelay.node.prefill_order import PrefillOrder
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache
from kvstore.blocks.queued_prefixes import QueuedPrefixes
from prefill_node.request import PrefillRequest


class Queued:
    """Container of QUEUED, in the order of ``order``. It knows how much of each request the prefix cache has."""

    def __init__(self, order: PrefillOrder[PrefillRequest], kv: KVCache, block_size: int) -> None:
        self._order = order
        self._block_size = block_size
        self._prefixes: QueuedPrefixes[PrefillRequest] = QueuedPrefixes(kv, self._resize)
        self._requests: dict[PrefillRequest, None] = {}
        self._sorted: tuple[int, list[PrefillRequest]] = (-1, [])

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[PrefillRequest]:
        return iter(self._requests)

    def __contains__(self, request: PrefillRequest) -> bool:
        return request in self._requests

    def add(self, request: PrefillRequest) -> None:
        """Take in a newcomer."""
        self._requests[request] = None
        num_tokens = self._num_uncached(request, self._prefixes.add(request))
        self._order.arrived(request, request.spec.priority, num_tokens, request.arrival_s)

    def remove(self, request: PrefillRequest) -> None:
        """Take out ``request``, wherever it stands."""
        del self._requests[request]
        self._prefixes.remove(request)

    def ordered(self, now: float) -> list[PrefillRequest]:
        """Return the requests in order, and perhaps some that have left. It is sorted when something has changed."""
        if self._sorted[0] != self._order.version:
            self._sorted = (self._order.version, self._order.queued(self._requests, now))
        return self._sorted[1]

    # ------------------------------------------------------------ prefix hits

    def match(self, request: PrefillRequest) -> list[BlockId]:
        """Return the blocks that hold a prefix of ``request``."""
        return self._prefixes.match(request)

    def lacks(self, request: PrefillRequest) -> bytes | None:
        """Return the hash of the first full block of ``request`` that is not published, as far as that is known."""
        return self._prefixes.lacks(request)

    def published(self, hashes: list[bytes]) -> None:
        """Note that blocks of ``hashes`` are published."""
        self._prefixes.published(hashes)

    def _resize(self, request: PrefillRequest, num_matched: int) -> None:
        self._order.resize(request, self._num_uncached(request, num_matched))

    def _num_uncached(self, request: PrefillRequest, num_matched: int) -> int:
        """Return how many tokens are to be computed if ``num_matched`` blocks are cached: one at least."""
        return max(1, request.num_tokens - num_matched * self._block_size)
