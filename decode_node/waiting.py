"""The requests that wait for blocks, in the order in which they get them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from decode_node.request import DecodeRequest, DecodeStatus
from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.node.prefill_order import PrefillOrder
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache
from kvstore.blocks.queued_prefixes import QueuedPrefixes


class WaitingQueue:
    """Container of WAITING and PREEMPTED, in the order of ``order``.

    A preempted request goes before all newcomers of its priority (``requeue: front``) or behind them (``tail``). With
    priority scheduling the lowest priority number comes first, less one for each ``priority_aging_s`` seconds of
    waiting, so that every request gets its turn.
    """

    def __init__(
        self, config: SchedulerConfig, order: PrefillOrder[DecodeRequest], kv: KVCache, block_size: int
    ) -> None:
        self._requests: deque[DecodeRequest] = deque()
        self._to_front = config.requeue == "front"
        self._order = order
        self._block_size = block_size
        self._prefixes: QueuedPrefixes[DecodeRequest] = QueuedPrefixes(kv, self._resize)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[DecodeRequest]:
        return iter(self._requests)

    def add(self, request: DecodeRequest) -> None:
        """Take in a newcomer, or a request that has just been preempted; for several of those see ``requeue_order``."""
        num_tokens = self._num_uncached(request, self._prefixes.add(request))
        is_preempted = request.status is DecodeStatus.PREEMPTED
        if is_preempted and self._to_front:
            self._requests.appendleft(request)
        else:
            self._requests.append(request)
        if is_preempted:
            self._order.returned(request, request.priority, num_tokens, request.arrival_s, to_front=self._to_front)
        else:
            self._order.arrived(request, request.priority, num_tokens, request.arrival_s)

    def requeue_order(self, victims: list[DecodeRequest]) -> list[DecodeRequest]:
        """Return in which order to add ``victims`` so that the one that arrived first is the first of them here."""
        oldest_first = sorted(victims, key=lambda request: request.arrival_s)
        return oldest_first[::-1] if self._to_front else oldest_first

    def remove(self, request: DecodeRequest) -> None:
        """Take out ``request``, wherever it stands."""
        self._requests.remove(request)
        self._prefixes.remove(request)

    def ordered(self, now: float) -> list[DecodeRequest]:
        """Return all requests that wait, the next one first."""
        return self._order.queued(self._requests, now)

    def urgency(self, request: DecodeRequest, now: float) -> float:
        """Return the priority of ``request`` less one for each ``priority_aging_s`` it has waited; lower is sooner."""
        return self._order.urgency(request.priority, request.arrival_s, now)

    # ------------------------------------------------------------ prefix hits

    def match(self, request: DecodeRequest) -> list[BlockId]:
        """Return the blocks that hold a prefix of ``request``."""
        return self._prefixes.match(request)

    def lacks(self, request: DecodeRequest) -> bytes | None:
        """Return the hash of the first full block of ``request`` that is not published, as far as that is known."""
        return self._prefixes.lacks(request)

    def published(self, hashes: list[bytes]) -> None:
        """Note that blocks of ``hashes`` are published."""
        self._prefixes.published(hashes)

    def _resize(self, request: DecodeRequest, num_matched: int) -> None:
        self._order.resize(request, self._num_uncached(request, num_matched))

    def _num_uncached(self, request: DecodeRequest, num_matched: int) -> int:
        """Return how many tokens are to be computed if ``num_matched`` blocks are cached: one at least."""
        return max(1, len(request.token_ids) - num_matched * self._block_size)
