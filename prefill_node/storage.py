"""What P has to do with the store: beginnings of prompts in, KV of requests that end here out."""

from __future__ import annotations

from typing import cast

from kvrelay.core.config import NodeConfig
from kvrelay.core.ids import Attempt
from kvrelay.core.machine import KVLoaded, LoadKV
from kvrelay.core.outbox import Outbox
from kvstore.kv_cache import KVCache
from kvstore.saver import Saver
from prefill_node.request import Holder, PrefillRequest, PrefillStatus


class Storage:
    """Reads what P's own prefix cache lacks, while other requests are computed. ``counters`` only grow.

    ``loading`` are requests that have their blocks and wait for the store to fill the first of them.
    """

    def __init__(self, node: NodeConfig, block_bytes: int, kv: KVCache, outbox: Outbox) -> None:
        self._config = node.storage
        self._block_size = node.cache.block_size
        self._min_blocks = -(-node.storage.min_read_tokens // self._block_size)
        self._outbox = outbox
        self.saver = Saver(node.storage, block_bytes, kv, outbox)
        self.loading: dict[Attempt, PrefillRequest] = {}
        self._started: dict[Attempt, PrefillRequest] = {}
        self.counters = {"kv_loads": 0.0, "kv_blocks_loaded": 0.0, "kv_blocks_not_loaded": 0.0}

    def load(self, request: PrefillRequest) -> bool:
        """Have the rest of the prompt read for a request that has just been admitted; False if that is not worth it."""
        first = request.num_cached_tokens // self._block_size
        num_blocks = len(request.hashes) - first
        if self._config.backend == "none" or num_blocks < self._min_blocks:
            return False
        request.lifecycle.move(PrefillStatus.LOADING, self._outbox.now)
        request.mark("load", self._outbox.now)
        request.holders.add(Holder.STORE)
        self.loading[request.attempt] = self._started[request.attempt] = request
        self.counters["kv_loads"] += 1
        blocks = request.sequence.block_table[first : len(request.hashes)]
        self._outbox.do(
            LoadKV(request.attempt, request.hashes[first:], blocks, self._min_blocks, self._config.read_timeout_s)
        )
        return True

    def loaded(self, event: KVLoaded) -> PrefillRequest:
        """Count what the store had as cached; return the request, which may be over. The store is no holder now."""
        request = self._started.pop(cast(Attempt, event.key))
        self.loading.pop(request.attempt, None)
        first = request.num_cached_tokens // self._block_size
        hashes = request.hashes[first:]
        self.saver.remember(hashes[: event.num_blocks])
        self.saver.forget(hashes[event.num_blocks :])
        self.counters["kv_blocks_loaded"] += event.num_blocks
        self.counters["kv_blocks_not_loaded"] += len(hashes) - event.num_blocks
        if not request.is_over:
            request.mark("loaded", self._outbox.now)
            request.num_cached_tokens += event.num_blocks * self._block_size
            request.sequence.num_computed_tokens = request.num_cached_tokens
        return request

    def finished(self, request: PrefillRequest) -> None:
        """Save the KV of a request that needed no decode node, which would have done so: its blocks are published."""
        if self._config.write_policy == "on_finish":
            self.saver.save(request.hashes, lambda _: None)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way to or from the store."""
        return not len(self.saver) and not self._started
