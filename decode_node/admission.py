"""Which requests get blocks on a decode or mixed node: waiting ones, and those that P asks a reservation for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from decode_node.resume_policy import ReloadPolicy
from decode_node.schedule import Loading, Schedule
from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.node.headroom import ReservePolicy
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache


class Admission:
    """Gives blocks as far as ``max_num_seqs`` and the reserve for those that run allow it."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCache,
        block_size: int,
        requests: Requests,
        reserve: ReservePolicy,
        reload_policy: ReloadPolicy,
    ) -> None:
        self._kv = kv
        self._block_size = block_size
        self._requests = requests
        self._reserve = reserve
        self._reload_policy = reload_policy
        self._max_num_seqs = config.max_num_seqs
        self._watermark_blocks = int(config.watermark * kv.num_blocks)
        self._by_priority = config.enable_priority_scheduling

    # ------------------------------------------------------------ how much room there is

    @property
    def has_seats(self) -> bool:
        """Whether fewer than ``max_num_seqs`` requests have blocks."""
        return self._requests.num_holding < self._max_num_seqs

    def headroom_blocks(self, leaving: Collection[DecodeRequest] = ()) -> int:
        """Return how many blocks the reserve policy keeps free for all that have blocks but those in ``leaving``."""
        growing = self._requests.growing()
        if leaving:
            growing = [request for request in growing if request not in leaving]
        return self._reserve.headroom_blocks(growing)

    def fits(
        self,
        request: DecodeRequest,
        num_new: int,
        matched: Sequence[BlockId],
        leaving: Collection[DecodeRequest] = (),
    ) -> bool:
        """Return whether ``request`` may have ``num_new`` blocks beside ``matched`` and leave enough to the running.

        ``leaving`` have just given their blocks back. When no other request has blocks nothing is kept free: whatever
        fits is admitted, so the reserve never leaves a node idle.
        """
        if self._requests.num_holding == len(leaving):
            return self._kv.can_allocate(num_new, matched)
        kept_free = self.headroom_blocks(leaving) + self._reserve.charge_blocks(request) + self._watermark_blocks
        return self._kv.can_allocate(num_new + kept_free, matched)

    def may_reserve(self, priority: int, num_tokens: int, now: float) -> str | None:
        """Return why no reservation for ``num_tokens`` can be granted now, whatever is free, or None."""
        requests = self._requests
        if requests.num_holding + len(requests.waiting) >= self._max_num_seqs:
            return f"max_num_seqs ({self._max_num_seqs}) requests are here"
        preempted = (request for request in requests.waiting if request.status is DecodeStatus.PREEMPTED)
        if any(not self._by_priority or requests.waiting.urgency(request, now) <= priority for request in preempted):
            return "preempted requests wait for blocks"
        if not requests.order.may_be_passed(priority, num_tokens):
            return "prompts that came earlier wait for blocks"
        return None

    def blocks_of(self, request: DecodeRequest) -> tuple[list[BlockId], int]:
        """Return the blocks that hold a prefix of a waiting ``request`` already, and how many more it needs.

        Its newest token is always computed again, for the next one's logits, but never written again.
        """
        matched = self._requests.waiting.match(request)
        return matched, -(-len(request.token_ids) // self._block_size) - len(matched)

    # ------------------------------------------------------------ requests that wait

    def admit(self, request: DecodeRequest, schedule: Schedule, now: float) -> bool:
        """Give ``request`` its blocks if it may have them now, and note it in ``schedule``.

        It is LOADING if some of its KV is to be read from the store, otherwise RUNNING_PREFILL. Returns whether other
        requests may be admitted after it: not if there are too few blocks for this one. They may if it waits for
        something else: its next block is being computed for another request, or its KV is still being written to the
        store, or it would overtake an older prompt too far.
        """
        if self._reload_policy.waits(request) or self._must_wait(request):
            return True
        matched, num_new = self.blocks_of(request)
        if self._must_wait(request):  # after all: blocks have been evicted
            return True
        if not self.fits(request, num_new, matched):
            return False
        num_stored = self._reload_policy.num_blocks(request, len(matched), now)
        self._take_blocks(request, num_new, matched)
        if num_stored:
            self._requests.move(request, DecodeStatus.LOADING, now)
            schedule.loading.append(Loading(request, len(matched), num_stored))
        else:
            self._requests.move(request, DecodeStatus.RUNNING_PREFILL, now)
            schedule.admitted.append(request)
        return self.has_seats

    def _must_wait(self, request: DecodeRequest) -> bool:
        return self._waits_for_a_block(request) or not self._requests.order.may_overtake(request)

    def _waits_for_a_block(self, request: DecodeRequest) -> bool:
        """Return whether the next block that ``request`` lacks is being computed for another and it may wait."""
        requests = self._requests
        lacking = requests.waiting.lacks(request)
        return lacking is not None and lacking in requests.pending and requests.order.may_wait_for_a_block(request)

    def _take_blocks(self, request: DecodeRequest, num_new: int, matched: list[BlockId]) -> None:
        self._kv.pin(matched)
        request.take_blocks([*matched, *self._kv.allocate(num_new)])
        request.num_computed_tokens = len(matched) * self._block_size
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
        self._kv.record_query(len(request.token_ids), request.num_computed_tokens)
        self._requests.order.admitted(request, request.num_uncomputed_tokens)
        if self._kv.prefix_caching:
            # A copy: the request's own list grows with its output, what is promised does not.
            self._requests.pending.add(request, tuple(request.hashes), len(matched))
