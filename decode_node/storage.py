"""KV of preempted and finished requests is saved to the store, KV of resumed ones is read from it."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from decode_node.publishing import Publisher
from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from decode_node.resume_policy import ReloadPolicy
from decode_node.schedule import Loading
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, StoreCounted
from kvrelay.machine.outbox import Outbox
from kvrelay.node.endings import Endings
from kvrelay.node.request import Holder
from kvrelay.protocol.messages.node_to_router import RequestPreempted
from kvstore.offload.kv_offloader import KVOffloader, Saved
from kvstore.offload.store_transfers import StoreTransfers


class PreemptedKV(NamedTuple):
    """What a save is for: the KV that ``request`` had at its preemption number ``preemption``."""

    request: DecodeRequest
    preemption: int


SaveOwner: TypeAlias = PreemptedKV | None
"""None: KV of a finished request; nothing follows its save."""


class Storage:
    """Starts saves and reads for requests, and takes the answers of the store.

    For a preempted request ``preempted`` starts the save (StageKV); ``take`` gets its answers KVStaged and KVStored,
    and after the last one tells the router. When the request is admitted again and is to be read, ``load`` starts that
    (LoadKV) and ``loaded`` takes the answer KVLoaded.
    """

    def __init__(
        self,
        node: NodeConfig,
        requests: Requests,
        endings: Endings[DecodeRequest, DecodeStatus],
        publisher: Publisher,
        offloader: KVOffloader[SaveOwner],
        reload_policy: ReloadPolicy,
        outbox: Outbox,
    ) -> None:
        self._config = node.storage
        self._block_size = node.cache.block_size
        self._requests = requests
        self._endings = endings
        self._publisher = publisher
        self._offloader = offloader
        self._reload_policy = reload_policy
        self._outbox = outbox
        self.transfers: StoreTransfers[Loading, SaveOwner] = StoreTransfers(
            node.storage, self._block_size, offloader, outbox
        )

    # ------------------------------------------------------------ saving

    def preempted(self, request: DecodeRequest) -> None:
        """Save what ``request`` had in the pool, then let the router look for a node that has room sooner."""
        if self._config.write_policy == "off" or self._config.resume == "recompute":
            self._report_preempted(request)
            return
        request.is_saving = True
        self._on_saved(self._offloader.save(request.hashes, PreemptedKV(request, request.num_preemptions)))

    def finished(self, request: DecodeRequest) -> None:
        """Save the context of ``request``, which is published, for prompts that continue it."""
        if self._config.write_policy == "on_finish":
            self._on_saved(self._offloader.save(request.hashes, None))

    def take(self, event: KVStaged | KVStored | StoreCounted) -> None:
        """Take an answer of a save, or the store's counters."""
        self._on_saved(self.transfers.take(event))

    def _on_saved(self, saved: Saved[SaveOwner] | None) -> None:
        """Note that a save is over, if one is."""
        if saved is None or saved.owner is None:
            return
        request, preemption = saved.owner
        if request.num_preemptions != preemption:
            return  # preempted again meanwhile: the later save counts
        request.is_saving = False
        request.num_stored_blocks = saved.num_blocks
        self._report_preempted(request)

    def _report_preempted(self, request: DecodeRequest) -> None:
        if request.status is DecodeStatus.PREEMPTED:
            preempted = RequestPreempted(
                request_id=request.spec.request_id,
                epoch=request.spec.epoch,
                num_blocks=-(-(len(request.token_ids) + 1) // self._block_size),
            )
            self._outbox.send(request.spec.router, preempted)

    # ------------------------------------------------------------ reading

    def load(self, loading: Loading) -> None:
        """Read blocks of a request that has just been admitted, and is LOADING."""
        request = loading.request
        request.holders.add(Holder.STORE)
        request.mark("load", self._outbox.now)
        span = slice(loading.first_block, loading.first_block + loading.num_blocks)
        timeout_s = self._config.timeout_s if request.num_preemptions else self._config.read_timeout_s
        self.transfers.load(request.attempt, loading, request.hashes[span], request.block_table[span], timeout_s)

    def loaded(self, event: KVLoaded) -> None:
        """Let the request compute what the store did not have."""
        loading, seconds = self.transfers.loaded(event)
        request, now = loading.request, self._outbox.now
        if event.num_blocks:
            self._reload_policy.reload_speed.add(event.num_blocks * self._block_size, seconds, now)
        if not request.is_over:
            request.mark("loaded", now)
            request.num_computed_tokens += event.num_blocks * self._block_size
            if request.num_preemptions == 0:
                request.num_stored_tokens = event.num_blocks * self._block_size
                request.num_cached_tokens = request.num_computed_tokens
            self._publisher.publish(request)
            self._requests.move(request, DecodeStatus.RUNNING_PREFILL, now)
        self._endings.release(request, Holder.STORE)
