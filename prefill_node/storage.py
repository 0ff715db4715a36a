"""Beginnings of prompts are read from the store; KV of requests that end on P is saved to it."""

from __future__ import annotations

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.machine.contract import KVLoaded
from kvrelay.machine.outbox import Outbox
from kvrelay.node.request import Holder
from kvstore.blocks.kv_cache import KVCache
from kvstore.offload.kv_offloader import KVOffloader
from kvstore.offload.store_transfers import StoreTransfers
from prefill_node.request import PrefillRequest, PrefillStatus
from prefill_node.requests import Requests


class Storage:
    """Reads what P's own prefix cache lacks, while other requests are computed. Nothing follows its saves."""

    def __init__(self, node: NodeConfig, block_bytes: int, kv: KVCache, requests: Requests, outbox: Outbox) -> None:
        self._config = node.storage
        self._block_size = node.cache.block_size
        self._requests = requests
        self._outbox = outbox
        self._offloader: KVOffloader[None] = KVOffloader(node.storage, block_bytes, kv, outbox)
        self.transfers: StoreTransfers[PrefillRequest, None] = StoreTransfers(
            node.storage, self._block_size, self._offloader, outbox
        )

    def load(self, request: PrefillRequest) -> bool:
        """Have the rest of the prompt read for a request that has just been admitted; False if that is not worth it.

        The request is LOADING until the answer is given to ``loaded``.
        """
        first = request.num_cached_tokens // self._block_size
        hashes = request.reusable_hashes[first:]
        if self._config.backend == "none" or len(hashes) < self.transfers.min_blocks:
            return False
        self._requests.move(request, PrefillStatus.LOADING, self._outbox.now)
        request.mark("load", self._outbox.now)
        request.holders.add(Holder.STORE)
        blocks = request.block_table[first : len(request.hashes)]
        self.transfers.load(request.attempt, request, hashes, blocks, self._config.read_timeout_s)
        return True

    def loaded(self, event: KVLoaded) -> PrefillRequest:
        """Count what the store had as cached; return the request, which may be over. The caller releases STORE."""
        request, _ = self.transfers.loaded(event)
        if not request.is_over:
            request.mark("loaded", self._outbox.now)
            request.num_stored_tokens = event.num_blocks * self._block_size
            request.num_cached_tokens += request.num_stored_tokens
            request.num_computed_tokens = request.num_cached_tokens
        return request

    def finished(self, request: PrefillRequest) -> None:
        """Save the KV of a request that needed no decode node, which would have done so: its blocks are published."""
        if self._config.write_policy == "on_finish":
            self._offloader.save(request.hashes, None)
