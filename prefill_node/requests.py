"""The requests of a prefill node, by status."""

from __future__ import annotations

from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.node.prefill_order import PrefillOrder, prefill_order
from kvrelay.node.request_table import RequestSet, RequestTable
from kvstore.blocks.kv_cache import KVCache
from kvstore.blocks.pending_prefixes import PendingPrefixes
from prefill_node.queued import Queued
from prefill_node.request import PrefillRequest, PrefillStatus


class Requests(RequestTable[PrefillRequest, PrefillStatus]):
    """Every request the node knows.

    Those in ``queued`` have no blocks. ``order`` has every prompt, and ``pending`` the full blocks that admitted ones
    have yet to compute, until the first token is out or the request is over.
    """

    def __init__(self, config: SchedulerConfig, kv: KVCache, block_size: int) -> None:
        self.order: PrefillOrder[PrefillRequest] = prefill_order(config)
        self.pending = PendingPrefixes()
        self.queued = Queued(self.order, kv, block_size)
        self.loading: RequestSet[PrefillRequest] = RequestSet()
        self.running: RequestSet[PrefillRequest] = RequestSet(self._prompt_ready)
        self.sending: RequestSet[PrefillRequest] = RequestSet(self._prompt_ended)
        self.closing: RequestSet[PrefillRequest] = RequestSet(self._prompt_ended)
        super().__init__(
            {
                PrefillStatus.QUEUED: self.queued,
                PrefillStatus.LOADING: self.loading,
                PrefillStatus.RUNNING_PREFILL: self.running,
                PrefillStatus.SENDING: self.sending,
                PrefillStatus.CLOSING: self.closing,
            }
        )

    def resident(self) -> list[PrefillRequest]:
        """Return the requests that have blocks and are not over."""
        return [*self.sending, *self.running, *self.loading]

    def _prompt_ready(self, request: PrefillRequest) -> None:
        self.order.ready(request, request.num_uncomputed_tokens)

    def _prompt_ended(self, request: PrefillRequest) -> None:
        """Note that the prompt is computed, or never will be."""
        self.order.left(request)
        self.pending.withdraw(request)
