"""Requests that wait for blocks of their own, and how they get them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from kvstore.kv_cache import KVCache
from kvstore.promised import PromisedBlocks
from prefill_node.policy import PrefillPolicy
from prefill_node.request import PrefillRequest


class Admission:
    """A queue, first come, first served: P has no other. Each request gets blocks for all its tokens at once."""

    def __init__(self, kv: KVCache, policy: PrefillPolicy, block_size: int) -> None:
        self._kv = kv
        self._policy = policy
        self._block_size = block_size
        self._queued: deque[PrefillRequest] = deque()
        self._promised = PromisedBlocks()

    def __len__(self) -> int:
        return len(self._queued)

    def __iter__(self) -> Iterator[PrefillRequest]:
        return iter(self._queued)

    @property
    def num_promised(self) -> int:
        """Blocks that admitted requests have yet to compute."""
        return len(self._promised)

    def add(self, request: PrefillRequest) -> None:
        """Append a newcomer."""
        self._queued.append(request)

    def admit(self, here: Sequence[PrefillRequest]) -> PrefillRequest | None:
        """Give blocks to the next request and return it, or None if there is nobody or no room; ``here`` have theirs.

        One whose next block is being computed for another is passed over until it is there to share.
        """
        for request in self._queued:
            matched = self._kv.match(request.hashes)
            if len(matched) < len(request.hashes) and request.hashes[len(matched)] in self._promised:
                continue
            num_tokens = request.sequence.num_tokens
            num_new = -(-num_tokens // self._block_size) - len(matched)
            if not self._policy.admits(request, num_new, matched, here):
                return None
            self._queued.remove(request)
            self._kv.pin(matched)
            request.sequence.take_blocks([*matched, *self._kv.allocate(num_new)])
            request.num_cached_tokens = request.sequence.num_computed_tokens = len(matched) * self._block_size
            self._kv.record_query(num_tokens, request.num_cached_tokens)
            if self._kv.prefix_caching:
                self._promised.promise(request, request.hashes, len(matched))
            return request
        return None

    def publish(self, request: PrefillRequest) -> None:
        """Make the full blocks of ``request`` that are computed matchable."""
        num_blocks = request.sequence.num_computed_tokens // self._block_size
        self._kv.publish(request.hashes[:num_blocks], request.sequence.block_table[:num_blocks])
        self._promised.keep(request, num_blocks)

    def computes_no_more(self, request: PrefillRequest) -> None:
        """Note that ``request`` is through, or given up: nobody needs to wait for its blocks, and it waits for none."""
        self._promised.withdraw(request)
        if request in self._queued:
            self._queued.remove(request)
