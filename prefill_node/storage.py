"""What P has to do with the store: beginnings of prompts in, KV of requests that end here out."""

from __future__ import annotations

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.machine.contract import KVLoaded
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import Attempt
from kvstore.blocks.kv_cache import KVCache
from kvstore.offload.kv_offloader import KVOffloader
from kvstore.offload.store_transfers import StoreTransfers
from prefill_node.request import Holder, PrefillRequest, PrefillStatus


class Storage:
    """Reads what P's own prefix cache lacks, while other requests are computed.

    ``loading`` are requests that have their blocks and wait for the store to fill the first of them.
    """

    def __init__(self, node: NodeConfig, block_bytes: int, kv: KVCache, outbox: Outbox) -> None:
        self._config = node.storage
        self._block_size = node.cache.block_size
        self._outbox = outbox
        self.offloader = KVOffloader(node.storage, block_bytes, kv, outbox)
        self.transfers: StoreTransfers[PrefillRequest] = StoreTransfers(
            node.storage, self._block_size, self.offloader, outbox
        )
        self.loading: dict[Attempt, PrefillRequest] = {}

    def load(self, request: PrefillRequest) -> bool:
        """Have the rest of the prompt read for a request that has just been admitted; False if that is not worth it."""
        first = request.num_cached_tokens // self._block_size
        hashes = request.hashes[first:]
        if self._config.backend == "none" or len(hashes) < self.transfers.min_blocks:
            return False
        request.lifecycle.move(PrefillStatus.LOADING, self._outbox.now)
        request.mark("load", self._outbox.now)
        request.holders.add(Holder.STORE)
        self.loading[request.attempt] = request
        blocks = request.sequence.block_table[first : len(request.hashes)]
        self.transfers.load(request.attempt, request, hashes, blocks, self._config.read_timeout_s)
        return True

    def loaded(self, event: KVLoaded) -> PrefillRequest:
        """Count what the store had as cached; return the request, which may be over. The store is no holder now."""
        request, _ = self.transfers.loaded(event)
        self.loading.pop(request.attempt, None)
        if not request.is_over:
            request.mark("loaded", self._outbox.now)
            request.num_cached_tokens += event.num_blocks * self._block_size
            request.sequence.num_computed_tokens = request.num_cached_tokens
        return request

    def finished(self, request: PrefillRequest) -> None:
        """Save the KV of a request that needed no decode node, which would have done so: its blocks are published."""
        if self._config.write_policy == "on_finish":
            self.offloader.save(request.hashes, lambda _: None)
