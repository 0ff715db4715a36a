"""The requests of a decode or mixed node, by status."""

from __future__ import annotations

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.waiting import WaitingQueue
from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.node.prefill_order import PrefillOrder, prefill_order
from kvrelay.node.request_table import RequestSet, RequestTable
from kvstore.blocks.kv_cache import KVCache
from kvstore.blocks.pending_prefixes import PendingPrefixes


class Requests(RequestTable[DecodeRequest, DecodeStatus]):
    """Every request the node knows.

    Those with blocks are in ``receiving`` (reserved for P, its KV on the way), ``loading`` (its KV on the way from the
    store), ``prefilling`` or ``decoding``, each in the order of joining; those without are in ``waiting``. ``order``
    has every prompt that this node is to compute, and ``pending`` the full blocks that admitted ones have yet to
    compute, until the request decodes or is over.
    """

    def __init__(self, config: SchedulerConfig, kv: KVCache, block_size: int) -> None:
        self.order: PrefillOrder[DecodeRequest] = prefill_order(config)
        self.pending = PendingPrefixes()
        self.waiting = WaitingQueue(config, self.order, kv, block_size)
        self.receiving: RequestSet[DecodeRequest] = RequestSet()
        self.loading: RequestSet[DecodeRequest] = RequestSet()
        self.prefilling: RequestSet[DecodeRequest] = RequestSet(self._prompt_ready)
        self.decoding: RequestSet[DecodeRequest] = RequestSet(self._prompt_ended)
        self.closing: RequestSet[DecodeRequest] = RequestSet(self._prompt_ended)
        super().__init__(
            {
                DecodeStatus.RESERVING: self.receiving,
                DecodeStatus.RECEIVING: self.receiving,
                DecodeStatus.WAITING: self.waiting,
                DecodeStatus.PREEMPTED: self.waiting,
                DecodeStatus.LOADING: self.loading,
                DecodeStatus.RUNNING_PREFILL: self.prefilling,
                DecodeStatus.RUNNING_DECODE: self.decoding,
                DecodeStatus.CLOSING: self.closing,
            }
        )

    @property
    def num_holding(self) -> int:
        """Requests that have blocks and are not over."""
        return len(self.receiving) + len(self.loading) + len(self.prefilling) + len(self.decoding)

    def growing(self) -> list[DecodeRequest]:
        """Return the requests that have blocks and will need more: all that are not over."""
        return [*self.receiving, *self.loading, *self.prefilling, *self.decoding]

    def _prompt_ready(self, request: DecodeRequest) -> None:
        self.order.ready(request, request.num_uncomputed_tokens)

    def _prompt_ended(self, request: DecodeRequest) -> None:
        """Note that the prompt is computed, or never will be. A request that was received never had one here."""
        self.order.left(request)
        self.pending.withdraw(request)
