"""Making computed blocks matchable for other requests."""

from __future__ import annotations

from decode_node.request import DecodeRequest
from decode_node.requests import Requests
from kvrelay.node.in_flight import PlansInFlight
from kvrelay.node.plans import PlanWriter
from kvrelay.protocol.block_hash import BlockHasher
from kvstore.blocks.kv_cache import KVCache


class Publisher:
    """Publishes blocks of requests. Blocks whose content is published already are replaced by the published ones."""

    def __init__(
        self,
        kv: KVCache,
        hasher: BlockHasher,
        requests: Requests,
        plans: PlanWriter,
        in_flight: PlansInFlight[DecodeRequest],
    ) -> None:
        self._kv = kv
        self._hasher = hasher
        self._requests = requests
        self._plans = plans
        self._in_flight = in_flight
        self._unshared: dict[DecodeRequest, int] = {}

    def publish(self, request: DecodeRequest) -> None:
        """Make the full blocks of ``request`` that are computed matchable."""
        # A request that ended within accepted drafts has computed tokens that it does not have.
        num_full = min(request.num_computed_tokens, len(request.token_ids)) // self._hasher.block_size
        if num_full > len(request.hashes):
            self._hasher.extend(request.hashes, request.token_ids[: num_full * self._hasher.block_size])
        self.publish_blocks(request, num_full)
        self._requests.pending.published(request, num_full)

    def publish_blocks(self, request: DecodeRequest, num_blocks: int) -> None:
        """Make the first ``num_blocks`` blocks of ``request`` matchable. Nothing may write to them any more.

        If others have published the same contents, the request takes their blocks and gives its own copies back.
        Keeping copies would cost twice: blocks published behind them keep the others' from being evicted, though no
        other request needs them, and a request alone could not grow into their place. While a plan in flight reads the
        copies they are kept, because their next owner would write to them; ``share_late`` exchanges them afterwards.
        """
        hashes, table = request.hashes[:num_blocks], request.block_table
        self._kv.publish(hashes, table[:num_blocks], request.token_ids)
        self._requests.waiting.published(hashes)
        shared = [(place, block) for place, block in enumerate(self._kv.match(hashes)) if table[place] != block]
        if not shared:
            return
        if request in self._in_flight:
            self._unshared[request] = num_blocks
            return
        self._kv.pin([block for _, block in shared])
        copies = [table[place] for place, _ in shared]
        for place, block in shared:
            table[place] = block
        self._kv.unpin(copies)
        self._plans.replaced(request, shared)

    def share_late(self) -> None:
        """Exchange the copies that plans in flight were reading when they were published. Now none is."""
        unshared, self._unshared = self._unshared, {}
        for request, num_blocks in unshared.items():
            if not request.is_over:  # it may have been preempted, and have other blocks by now
                self.publish_blocks(request, min(num_blocks, request.num_computed_tokens // self._hasher.block_size))
