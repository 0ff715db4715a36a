"""The requests that wait for blocks, in the order in which they get them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from decode_node.request import DecodeRequest
from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.node.prefill_order import PrefillOrder
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache
from kvstore.blocks.queued_prefixes import QueuedPrefixes


class WaitingQueue:
    """In the order of ``order``; a preempted request goes before all of its urgency (``requeue: front``) or back again.

    With priority scheduling the most urgent comes first, and waiting makes urgent: ``priority_aging_s`` seconds count
    as one level, so nobody waits for ever.
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
        """Append a newcomer."""
        self._requests.append(request)
        num_tokens = self._num_uncached(request, self._prefixes.add(request))
        self._order.arrived(request, request.priority, num_tokens, request.arrival_s)

    def requeue(self, victims: list[DecodeRequest]) -> None:
        """Put back the victims of one step, those that began to decode first in front."""
        ordered = sorted(victims, key=lambda request: request.arrival_s)
        if self._to_front:
            self._requests.extendleft(reversed(ordered))
        else:
            self._requests.extend(ordered)
        for victim in ordered:
            num_tokens = self._num_uncached(victim, self._prefixes.add(victim))
            self._order.returned(victim, victim.priority, num_tokens, victim.arrival_s, to_front=self._to_front)

    def remove(self, request: DecodeRequest) -> None:
        """Take out ``request``, which is given up, wherever it stands."""
        self._take_out(request)
        self._order.left(request)

    def admit(self, request: DecodeRequest) -> None:
        """Take out ``request``, which has just got its blocks."""
        self._take_out(request)
        self._order.admitted(request, request.num_uncomputed_tokens)

    def _take_out(self, request: DecodeRequest) -> None:
        self._requests.remove(request)
        self._prefixes.remove(request)

    def ordered(self, now: float) -> list[DecodeRequest]:
        """Return all who wait, the next one first."""
        return self._order.queued(self._requests, now)

    def urgency(self, request: DecodeRequest, now: float) -> float:
        """Return the priority of ``request`` less what it has earned by waiting; lower is sooner."""
        return self._order.urgency(request.priority, request.arrival_s, now)

    # ------------------------------------------------------------ what the prefix cache has of them

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
        """Return how many tokens are to compute when ``num_matched`` blocks are not; the newest always is."""
        return max(1, len(request.token_ids) - num_matched * self._block_size)
