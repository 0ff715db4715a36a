"""What D has to do with the store: KV of preempted and finished requests out, KV of resumed ones in."""

from __future__ import annotations

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from decode_node.resume_policy import LoadPolicy
from decode_node.schedule import Loading, Scheduler
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.machine.contract import KVLoaded
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.messages.node_to_router import RequestPreempted
from kvstore.offload.kv_offloader import KVOffloader
from kvstore.offload.store_transfers import StoreTransfers


class Storage:
    """Starts saves and loads, and takes their ends."""

    def __init__(
        self,
        node: NodeConfig,
        scheduler: Scheduler,
        requests: Requests,
        offloader: KVOffloader,
        loads: LoadPolicy,
        outbox: Outbox,
    ) -> None:
        self._config = node.storage
        self._block_size = node.cache.block_size
        self._scheduler = scheduler
        self._requests = requests
        self._offloader = offloader
        self._loads = loads
        self._outbox = outbox
        self.transfers: StoreTransfers[Loading] = StoreTransfers(node.storage, self._block_size, offloader, outbox)

    # ------------------------------------------------------------ out

    def preempted(self, request: DecodeRequest) -> None:
        """Save what ``request`` had in the pool, and let the router look for a node that has room sooner."""
        if self._config.write_policy == "off" or self._config.resume == "recompute":
            self._tell_router(request)
            return
        request.is_saving, number = True, request.num_preemptions

        def saved(num_blocks: int) -> None:
            if request.num_preemptions != number:
                return  # preempted again meanwhile: the later save counts
            request.is_saving = False
            request.num_stored_blocks = num_blocks
            self._tell_router(request)

        self._offloader.save(request.hashes, saved)

    def finished(self, request: DecodeRequest) -> None:
        """Save the context of ``request`` for whoever continues it: it is published."""
        if self._config.write_policy == "on_finish":
            self._offloader.save(request.hashes, lambda _: None)

    def _tell_router(self, request: DecodeRequest) -> None:
        if request.status is DecodeStatus.PREEMPTED:
            preempted = RequestPreempted(
                request_id=request.spec.request_id,
                epoch=request.spec.epoch,
                num_blocks=-(-(len(request.token_ids) + 1) // self._block_size),
            )
            self._outbox.send(request.spec.router, preempted)

    # ------------------------------------------------------------ in

    def load(self, loading: Loading) -> None:
        """Read blocks of a request that has just been admitted."""
        request = loading.request
        request.is_loading = True
        request.lifecycle.move(DecodeStatus.LOADING, self._outbox.now)
        request.mark("load", self._outbox.now)
        span = slice(loading.first_block, loading.first_block + loading.num_blocks)
        timeout_s = self._config.timeout_s if request.num_preemptions else self._config.read_timeout_s
        self.transfers.load(request.attempt, loading, request.hashes[span], request.block_table[span], timeout_s)

    def loaded(self, event: KVLoaded) -> None:
        """Go on with what the store had; the rest is computed."""
        loading, seconds = self.transfers.loaded(event)
        request, now = loading.request, self._outbox.now
        request.is_loading = False
        if event.num_blocks:
            self._loads.loading.add(event.num_blocks * self._block_size, seconds, now)
        if request.is_over:
            self._requests.end_if_unused(request)
            return
        request.lifecycle.move(DecodeStatus.RUNNING_PREFILL, now)
        request.mark("loaded", now)
        self._scheduler.loaded(request, event.num_blocks)
