"""Requests that wait for blocks of their own, and how they get them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.node.prefill_order import PrefillOrder, prefill_order
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache
from kvstore.blocks.pending_prefixes import PendingPrefixes
from kvstore.blocks.queued_prefixes import QueuedPrefixes
from prefill_node.policy import PrefillPolicy
from prefill_node.request import PrefillRequest


class Admission:
    """The queue of a prefill node. ``order`` says who is next; each request gets blocks for all its tokens at once."""

    def __init__(self, scheduler: SchedulerConfig, kv: KVCache, policy: PrefillPolicy, block_size: int) -> None:
        self._kv = kv
        self._policy = policy
        self._block_size = block_size
        self.order: PrefillOrder[PrefillRequest] = prefill_order(scheduler)
        self._prefixes: QueuedPrefixes[PrefillRequest] = QueuedPrefixes(kv, self._resize)
        self._queued: dict[PrefillRequest, None] = {}
        self._sorted: tuple[int, list[PrefillRequest]] = (-1, [])
        self._pending = PendingPrefixes()

    def __len__(self) -> int:
        return len(self._queued)

    def __iter__(self) -> Iterator[PrefillRequest]:
        return iter(self._queued)

    @property
    def num_promised(self) -> int:
        """Blocks that admitted requests have yet to compute."""
        return len(self._pending)

    def add(self, request: PrefillRequest, now: float) -> None:
        """Take in a newcomer."""
        self._queued[request] = None
        num_tokens = self._num_uncached(request, self._prefixes.add(request))
        self.order.arrived(request, request.spec.priority, num_tokens, now)

    def _resize(self, request: PrefillRequest, num_matched: int) -> None:
        self.order.resize(request, self._num_uncached(request, num_matched))

    def _num_uncached(self, request: PrefillRequest, num_matched: int) -> int:
        """Return how many tokens are to compute when ``num_matched`` blocks are not; the newest always is."""
        return max(1, request.sequence.num_tokens - num_matched * self._block_size)

    def admit(self, resident: Sequence[PrefillRequest], now: float) -> PrefillRequest | None:
        """Give blocks to the next request and return it; None: nobody waits, there is no room, or it is too early.

        Requests in ``resident`` have blocks. One whose next block is being computed for another is passed over until
        that is there to share, and one that would overtake another too far until that one has blocks.
        """
        for request in self._in_order(now):
            if request not in self._queued or self._must_wait(request):
                continue
            if not self.order.begins_soon(request, now):
                return None
            matched = self._prefixes.match(request)
            if self._must_wait(request):  # after all: blocks have been evicted
                continue
            num_new = -(-request.sequence.num_tokens // self._block_size) - len(matched)
            if not self._policy.admits(request, num_new, matched, resident):
                return None
            self._take_blocks(request, num_new, matched)
            return request
        return None

    def _in_order(self, now: float) -> list[PrefillRequest]:
        """Return the queue in order, and some who have left it. It is sorted when something has changed."""
        if self._sorted[0] != self.order.version:
            self._sorted = (self.order.version, self.order.queued(self._queued, now))
        return self._sorted[1]

    def _must_wait(self, request: PrefillRequest) -> bool:
        return self._waits_for_a_block(request) or not self.order.may_overtake(request)

    def _waits_for_a_block(self, request: PrefillRequest) -> bool:
        lacking = self._prefixes.lacks(request)
        return lacking is not None and lacking in self._pending and self.order.may_wait_for_a_block(request)

    def _take_blocks(self, request: PrefillRequest, num_new: int, matched: list[BlockId]) -> None:
        self._leave_queue(request)
        self._kv.pin(matched)
        request.sequence.take_blocks([*matched, *self._kv.allocate(num_new)])
        request.num_cached_tokens = request.sequence.num_computed_tokens = len(matched) * self._block_size
        self._kv.record_query(request.sequence.num_tokens, request.num_cached_tokens)
        self.order.admitted(request, request.num_remaining_tokens)
        if self._kv.prefix_caching:
            self._pending.promise(request, request.hashes, len(matched))

    def publish(self, request: PrefillRequest) -> None:
        """Make the full blocks of ``request`` that are computed matchable."""
        num_blocks = request.sequence.num_computed_tokens // self._block_size
        hashes = request.hashes[:num_blocks]
        self._kv.publish(hashes, request.sequence.block_table[:num_blocks])
        self._pending.published(request, num_blocks)
        self._prefixes.published(hashes)

    def forget(self, request: PrefillRequest) -> None:
        """Have the blocks of ``request`` computed anew for whoever comes next."""
        self._kv.forget(request.hashes)

    def prefill_ended(self, request: PrefillRequest) -> None:
        """Note that ``request`` is through, or given up: nobody needs to wait for its blocks, and it waits for none."""
        self._pending.withdraw(request)
        self.order.left(request)
        if request in self._queued:
            self._leave_queue(request)

    def _leave_queue(self, request: PrefillRequest) -> None:
        del self._queued[request]
        self._prefixes.remove(request)
