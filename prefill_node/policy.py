"""Who gets blocks on a prefill node, and what a step computes: the two policies of ``scheduler.prefill_policy``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.node.headroom import reserve_policy
from kvrelay.node.plans import Chunk
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache
from prefill_node.request import PrefillRequest
from prefill_node.requests import Requests
from prefill_node.schedule import prefill_schedule

Batch = list[tuple[PrefillRequest, Chunk]]


class PrefillPolicy(Protocol):
    """Called by ``Admission`` and ``Steps``. ``requests`` are all of the node, by status."""

    def admits(self, newcomer: PrefillRequest, num_new: int, matched: Sequence[BlockId], requests: Requests) -> bool:
        """Return whether ``newcomer`` may have ``num_new`` blocks beside ``matched`` now."""

    def schedule(
        self, running: Iterable[PrefillRequest], in_flight: Mapping[PrefillRequest, Chunk], num_sending: int
    ) -> Batch:
        """Return the chunks of the next step, of requests in ``running``, the first of which goes first.

        ``in_flight``: the last chunk of each request that has any in a plan in flight.
        """


class DedicatedPolicy:
    """No blocks are kept free, because no request on P grows; the whole token budget is for prompts."""

    def __init__(self, node: NodeConfig, kv: KVCache) -> None:
        self._kv = kv
        self._token_budget = node.scheduler.max_num_batched_tokens
        self._block_size = node.cache.block_size

    def admits(self, newcomer: PrefillRequest, num_new: int, matched: Sequence[BlockId], requests: Requests) -> bool:
        """Return whether there are enough blocks, free or evictable."""
        return self._kv.can_allocate(num_new, matched)

    def schedule(
        self, running: Iterable[PrefillRequest], in_flight: Mapping[PrefillRequest, Chunk], num_sending: int
    ) -> Batch:
        """Return chunks in the order of ``running``, with the whole budget."""
        return prefill_schedule(running, self._token_budget, self._block_size, in_flight)


class SharedPolicy:
    """The baseline: the rules of a node that also decodes.

    Headroom is kept free for every request that has blocks, as if it would decode here; requests that are only sending
    count against ``max_num_seqs`` and take the token of the budget that a decode would.
    """

    def __init__(self, node: NodeConfig, kv: KVCache) -> None:
        self._kv = kv
        self._max_num_seqs = node.scheduler.max_num_seqs
        self._token_budget = node.scheduler.max_num_batched_tokens
        self._block_size = node.cache.block_size
        self._watermark_blocks = int(node.scheduler.watermark * kv.num_blocks)
        self._reserve = reserve_policy(node.scheduler, node.cache.block_size)

    def admits(self, newcomer: PrefillRequest, num_new: int, matched: Sequence[BlockId], requests: Requests) -> bool:
        """Return whether the blocks leave the headroom of all requests that have blocks."""
        resident = requests.resident()
        if not resident:
            self._reserve.idle()
            return self._kv.can_allocate(num_new, matched)
        if len(resident) >= self._max_num_seqs:
            return False
        kept_free = self._reserve.headroom_blocks(resident) + self._reserve.charge_blocks(newcomer)
        return self._kv.can_allocate(num_new + kept_free + self._watermark_blocks, matched)

    def schedule(
        self, running: Iterable[PrefillRequest], in_flight: Mapping[PrefillRequest, Chunk], num_sending: int
    ) -> Batch:
        """Return chunks in the order of ``running``, with the budget less one token per request that is sending."""
        batch = prefill_schedule(running, max(1, self._token_budget - num_sending), self._block_size, in_flight)
        if batch:
            self._reserve.step_scheduled()
        return batch


def prefill_policy(node: NodeConfig, kv: KVCache) -> PrefillPolicy:
    """Return the policy that ``node`` names."""
    match node.scheduler.prefill_policy:
        case "dedicated":
            return DedicatedPolicy(node, kv)
        case "shared":
            return SharedPolicy(node, kv)
