"""Which queued request gets blocks next on a prefill node."""

from __future__ import annotations

from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache
from prefill_node.policy import PrefillPolicy
from prefill_node.request import PrefillRequest
from prefill_node.requests import Requests


class Admission:
    """Gives a request blocks for all its tokens at once. The caller moves it out of QUEUED then."""

    def __init__(self, kv: KVCache, block_size: int, requests: Requests, policy: PrefillPolicy) -> None:
        self._kv = kv
        self._block_size = block_size
        self._requests = requests
        self._policy = policy

    def admit(self, now: float) -> PrefillRequest | None:
        """Give blocks to the next request and return it; None: none waits, there is no room, or it is too early.

        A request whose next block is being computed for another is passed over until that block is published, and one
        that would overtake an older one too far until that one has blocks.
        """
        requests = self._requests
        for request in requests.queued.ordered(now):
            if request not in requests.queued or self._must_wait(request):
                continue
            if not requests.order.begins_soon(request, now):
                return None
            matched = requests.queued.match(request)
            if self._must_wait(request):  # after all: blocks have been evicted
                continue
            num_new = -(-request.num_tokens // self._block_size) - len(matched)
            if not self._policy.admits(request, num_new, matched, requests):
                return None
            self._take_blocks(request, num_new, matched)
            return request
        return None

    def _must_wait(self, request: PrefillRequest) -> bool:
        return self._waits_for_a_block(request) or not self._requests.order.may_overtake(request)

    def _waits_for_a_block(self, request: PrefillRequest) -> bool:
        """Return whether the next block that ``request`` lacks is being computed for another and it may wait."""
        requests = self._requests
        lacking = requests.queued.lacks(request)
        return lacking is not None and lacking in requests.pending and requests.order.may_wait_for_a_block(request)

    def _take_blocks(self, request: PrefillRequest, num_new: int, matched: list[BlockId]) -> None:
        self._kv.pin(matched)
        request.take_blocks([*matched, *self._kv.allocate(num_new)])
        request.num_cached_tokens = request.num_computed_tokens = len(matched) * self._block_size
        self._kv.record_query(request.num_tokens, request.num_cached_tokens)
        self._requests.order.admitted(request, request.num_uncomputed_tokens)
        if self._kv.prefix_caching:
            self._requests.pending.add(request, request.hashes, len(matched))

    def publish(self, request: PrefillRequest) -> None:
        """Make the full blocks of ``request`` that are computed matchable."""
        num_blocks = request.num_computed_tokens // self._block_size
        hashes = request.hashes[:num_blocks]
        self._kv.publish(hashes, request.block_table[:num_blocks], request.token_ids)
        self._requests.pending.published(request, num_blocks)
        self._requests.queued.published(hashes)

    def withdraw(self, request: PrefillRequest) -> None:
        """Have the blocks of ``request`` computed anew for the next request."""
        self._kv.withdraw(request.hashes)
