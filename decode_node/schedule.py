"""What a decode or mixed node computes next, and who gives way when blocks run out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from decode_node.decodes import Decodes
from decode_node.preempt import victim_order
from decode_node.publishing import Publisher
from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.resume_policy import LoadPolicy
from decode_node.waiting import WaitingQueue
from kvrelay.config.cluster_config import SchedulerConfig, SpeculativeConfig
from kvrelay.node.headroom import reserve_policy
from kvrelay.node.in_flight import PlansInFlight
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.node.prefill_order import PrefillOrder, prefill_order
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.block_hash import BlockHasher
from kvstore.blocks.kv_cache import KVCache
from kvstore.offload.kv_offloader import KVOffloader


class Loading(NamedTuple):
    """A request that has just got its blocks, and which of them are to be read from the store before it runs."""

    request: DecodeRequest
    first_block: int
    num_blocks: int


@dataclass(slots=True)
class Schedule:
    """One decision: ``chunks[i]`` is of ``requests[i]``.

    ``admitted`` and ``loading`` just got their blocks; ``exceeds_pool`` decodes alone and has no block to grow into.
    """

    requests: list[DecodeRequest] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[DecodeRequest] = field(default_factory=list)
    loading: list[Loading] = field(default_factory=list)
    preempted: list[DecodeRequest] = field(default_factory=list)
    exceeds_pool: DecodeRequest | None = None

    def add(self, request: DecodeRequest, start: int, budget: int) -> int:
        """Let the step compute the tokens of a prefill from ``start`` on, at most ``budget``; return how many."""
        num_remaining = len(request.token_ids) - start
        num_tokens = min(num_remaining, budget)
        self.requests.append(request)
        self.chunks.append(Chunk(start, num_tokens, num_tokens == num_remaining))
        return num_tokens


class Scheduler:
    """Who runs, who waits, and the pool they share.

    Requests that have blocks are in exactly one of ``receiving`` (reserved for P, its KV on the way), ``loading`` (its
    KV on the way from the store), ``prefilling`` and ``decoding``, each in the order of joining; requests without are
    in ``waiting``. The caller moves a request's status. Nobody who is in a plan in flight gives up blocks.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        speculative: SpeculativeConfig,
        kv: KVCache,
        hasher: BlockHasher,
        offloader: KVOffloader,
        loads: LoadPolicy,
        max_plans_in_flight: int = 1,
    ) -> None:
        self.kv = kv
        self.plans = PlanWriter()
        self.in_flight: PlansInFlight[DecodeRequest] = PlansInFlight(max_plans_in_flight)
        self._offloader = offloader
        self._loads = loads
        block_size = hasher.block_size
        self.order: PrefillOrder[DecodeRequest] = prefill_order(config)
        self.waiting = WaitingQueue(config, self.order, kv, block_size)
        self.receiving: dict[DecodeRequest, None] = {}
        self.loading: dict[DecodeRequest, None] = {}
        self.prefilling: dict[DecodeRequest, None] = {}
        self.decoding: dict[DecodeRequest, None] = {}
        self.reserve = reserve_policy(config, block_size)
        self._order = victim_order(config)
        self._decodes = Decodes(config, speculative, kv, block_size)
        self._publisher = Publisher(kv, hasher, self.waiting, self.order, self.plans, self.in_flight)
        self.publish, self.publish_blocks = self._publisher.publish, self._publisher.publish_blocks
        self._token_budget = config.max_num_batched_tokens
        self._max_num_seqs = config.max_num_seqs
        self._watermark_blocks = int(config.watermark * kv.num_blocks)
        self._block_size = block_size
        self._by_priority = config.enable_priority_scheduling
        self.preemptions = {"growth": 0, "priority": 0}

    @property
    def num_preempted(self) -> int:
        """Preemptions so far; ``preemptions`` has them by cause."""
        return sum(self.preemptions.values())

    @property
    def num_holding(self) -> int:
        """Requests that have blocks."""
        return len(self.receiving) + len(self.loading) + len(self.prefilling) + len(self.decoding)

    def growing(self) -> list[DecodeRequest]:
        """Return the requests that have blocks and will want more: all of them."""
        return [*self.receiving, *self.loading, *self.prefilling, *self.decoding]

    def reserved_blocks(self) -> int:
        """Return what the policy keeps free now."""
        return self.reserve.reserved_blocks(self.growing())

    # ------------------------------------------------------------ a step

    def schedule(self, now: float) -> Schedule:
        """Decide a step with no plan in flight: decodes, then prompts, newcomers too if nobody had to give way."""
        self._publisher.share_late()
        schedule = Schedule()
        stalled = self._make_room(schedule)
        if self._by_priority and self.waiting and not schedule.preempted:
            self._preempt_for_priority(schedule, self.waiting.ordered(now)[0], now)
        decodes = self._decodes.in_turn([request for request in self.decoding if request not in stalled])
        self._fill(schedule, decodes, {}, now)
        if not schedule.chunks and not self.num_holding and not self.waiting:
            self.reserve.idle()
        return schedule

    def schedule_ahead(self, now: float) -> Schedule:
        """Decide the step after the plans in flight, as far as it depends on none of their results but the next tokens.

        Nobody gives way for it. If somebody would have to, it is empty: ``schedule`` decides when the results are in.
        """
        schedule, in_flight = Schedule(), self.in_flight.chunks()
        if self._by_priority and self.waiting and self._displaced(self.waiting.ordered(now)[0], now):
            return schedule
        decodes = self._decodes.in_turn(self._decodes.after(in_flight, self.decoding, self.prefilling))
        if self._decodes.grow([(request, _next_end(request, in_flight)) for request in decodes]):
            self._fill(schedule, decodes, in_flight, now)
        return schedule

    def _fill(
        self,
        schedule: Schedule,
        decodes: list[DecodeRequest],
        in_flight: Mapping[DecodeRequest, Chunk],
        now: float,
    ) -> None:
        """Add ``decodes`` and then prompts to ``schedule``, from where the plans ``in_flight`` will leave them."""
        schedule.requests = decodes
        schedule.chunks, num_tokens = self._decodes.chunks(decodes, in_flight)
        self._add_prompts(schedule, self._token_budget - num_tokens, in_flight, now)
        if schedule.chunks:
            self.reserve.step_scheduled()

    def _make_room(self, schedule: Schedule) -> set[DecodeRequest]:
        """Give every decode the block its next token needs, at the cost of other decodes if need be.

        Returns the decodes that must sit this step out. One that decodes alone does so while others have blocks that
        cannot be taken (their KV is being received or computed; they will decode soon); if there are no others, it has
        outgrown the pool. All who need blocks do so while blocks of earlier victims are copied for the store: those
        will be free before another victim's would do any good.
        """
        size = self._block_size
        need_block = [request for request in self.decoding if len(request.token_ids) > len(request.block_table) * size]
        if not need_block:
            return set()
        if not self.kv.can_allocate(len(need_block)):
            if self._offloader.is_staging:
                return set(need_block)
            need_block = self._preempt(schedule, need_block)
        if not self.kv.can_allocate(len(need_block)):
            if self.kv.num_referenced == len(need_block[0].block_table):
                schedule.exceeds_pool = need_block[0]
            return set(need_block)
        for request, block in zip(need_block, self.kv.allocate(len(need_block)), strict=True):
            request.block_table.append(block)
        return set()

    def _preempt(self, schedule: Schedule, need_block: list[DecodeRequest]) -> list[DecodeRequest]:
        """Take blocks from victims until the need_block that stay can grow; return those. One decode always stays."""
        victims = iter(self._order(list(self.decoding)))
        waiting_for = set(need_block)
        while len(self.decoding) > 1:
            room = self.reserve.room_blocks(len(self.decoding)) if schedule.preempted else 0
            if self.kv.can_allocate(len(waiting_for) + room):
                break
            victim = next(victims)
            waiting_for.discard(victim)
            self._release_victim(victim, schedule)
        self._requeue(schedule.preempted, "growth")
        return [request for request in need_block if request in waiting_for]

    def _preempt_for_priority(self, schedule: Schedule, urgent: DecodeRequest, now: float) -> None:
        """Take blocks from decodes less urgent than ``urgent`` if that lets it in at the next step."""
        matched, num_new = self._blocks_of(urgent)
        for victim in self._displaced(urgent, now):
            self._release_victim(victim, schedule)
            if self.fits(urgent, num_new, matched):
                break
        self._requeue(schedule.preempted, "priority")

    def _displaced(self, urgent: DecodeRequest, now: float) -> list[DecodeRequest]:
        """Return decodes whose blocks would let ``urgent`` in; none if it fits as it is, or would not fit then.

        They are less urgent as the queue sees it: a victim that had waited longer would be before ``urgent`` there
        again, and the two would change places at every step.
        """
        matched, num_new = self._blocks_of(urgent)
        if self.fits(urgent, num_new, matched):
            return []
        urgency = self.waiting.urgency(urgent, now)
        victims = [
            victim
            for victim in self._order(list(self.decoding))
            if victim.priority > urgent.priority and self.waiting.urgency(victim, now) > urgency
        ]
        victims = victims[: len(self.decoding) - 1]
        num_freed = sum(len(victim.block_table) for victim in victims)
        return victims if self.kv.can_allocate(num_new - num_freed, matched) else []

    def _release_victim(self, victim: DecodeRequest, schedule: Schedule) -> None:
        """Take the blocks of ``victim``. Those that are full stay matchable until somebody needs them."""
        del self.decoding[victim]
        self.publish(victim)
        self.kv.unpin(victim.block_table)
        victim.take_blocks(())
        self.plans.leave(victim)
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        schedule.preempted.append(victim)

    def _requeue(self, victims: list[DecodeRequest], cause: str) -> None:
        if victims:
            self.preemptions[cause] += len(victims)
            self.waiting.requeue(victims)
            self.reserve.preempted(list(self.decoding))

    def _add_prompts(
        self, schedule: Schedule, budget: int, in_flight: Mapping[DecodeRequest, Chunk], now: float
    ) -> None:
        """Add the next chunks of prompts as far as the budget goes, in order; those that wait get their blocks now.

        Nobody gets blocks in a step that took some from others, nor when the one before did not get what it needs.
        """
        num_decodes = len(schedule.chunks)
        may_admit = not schedule.preempted and self.num_holding < self._max_num_seqs
        for request in self.order.merged(self.prefilling, self.waiting if may_admit else (), now):
            if budget <= 0:
                break
            if request not in self.prefilling and may_admit:
                may_admit = self._admit(request, schedule, now)
            if request in self.prefilling:
                start = in_flight[request].end if request in in_flight else request.next_position
                if start < len(request.token_ids):  # else its last chunk is in flight
                    budget -= schedule.add(request, start, budget)
        chunks = zip(schedule.requests[num_decodes:], schedule.chunks[num_decodes:], strict=True)
        self.order.computing(((request, chunk.num_tokens) for request, chunk in chunks), now)

    # ------------------------------------------------------------ admission

    def _admit(self, request: DecodeRequest, schedule: Schedule, now: float) -> bool:
        """Give ``request`` its blocks, and let it run unless the store has some of it; return if others may follow.

        They may not if there are too few for this one. They may if it waits for something else: its next block is being
        computed for another and soon there to share, or its KV is still being written to the store, or it would
        overtake another too far.
        """
        if self._loads.waits(request) or self._must_wait(request):
            return True
        matched, num_new = self._blocks_of(request)
        if self._must_wait(request):  # after all: blocks have been evicted
            return True
        if not self.fits(request, num_new, matched):
            return False
        self._take_blocks(request, num_new, matched)
        self.waiting.admit(request)
        if self.kv.prefix_caching:
            # A copy: the request's own list grows with its output, what is promised does not.
            self._publisher.pending.promise(request, tuple(request.hashes), len(matched))
        num_stored = self._loads.num_blocks(request, len(matched), now)
        if num_stored:
            self.loading[request] = None
            schedule.loading.append(Loading(request, len(matched), num_stored))
        else:
            self._run_prefill(request)
            schedule.admitted.append(request)
        return self.num_holding < self._max_num_seqs

    def _must_wait(self, request: DecodeRequest) -> bool:
        return self._publisher.may_wait_for_a_block(request) or not self.order.may_overtake(request)

    def _run_prefill(self, request: DecodeRequest) -> None:
        self.prefilling[request] = None
        self.order.ready(request, request.num_uncomputed_tokens)

    def _blocks_of(self, request: DecodeRequest) -> tuple[list[BlockId], int]:
        """Return the blocks that hold a prefix of ``request`` already, and how many more it needs to be computed here.

        Its newest token is always computed again, for the next one's logits, but never written again.
        """
        matched = self.waiting.match(request)
        return matched, -(-len(request.token_ids) // self._block_size) - len(matched)

    def _take_blocks(self, request: DecodeRequest, num_new: int, matched: list[BlockId]) -> None:
        self.kv.pin(matched)
        request.take_blocks([*matched, *self.kv.allocate(num_new)])
        request.num_computed_tokens = len(matched) * self._block_size
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
        self.kv.record_query(len(request.token_ids), request.num_computed_tokens)

    def loaded(self, request: DecodeRequest, num_blocks: int) -> None:
        """Let ``request`` be prefilled from where the store's ``num_blocks`` blocks end."""
        del self.loading[request]
        request.num_computed_tokens += num_blocks * self._block_size
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
        self.publish(request)
        self._run_prefill(request)

    def leave_loading(self, request: DecodeRequest) -> None:
        """Take ``request`` out of those being loaded: it is given up."""
        del self.loading[request]
        self.order.left(request)
        self._publisher.pending.withdraw(request)

    def leave_prefill(self, request: DecodeRequest) -> None:
        """Take ``request`` out of those being prefilled: it is through, or given up."""
        del self.prefilling[request]
        self.order.left(request)
        self._publisher.pending.withdraw(request)

    def fits(self, request: DecodeRequest, num_new: int, matched: Sequence[BlockId]) -> bool:
        """Return whether ``request`` may have ``num_new`` blocks beside ``matched`` and leave enough to the running.

        When nobody has blocks the reserve is for nobody: whatever fits may come, so the reserve never leaves a node
        idle.
        """
        if not self.num_holding:
            return self.kv.can_allocate(num_new, matched)
        kept_free = self.reserved_blocks() + self.reserve.charge_blocks(request) + self._watermark_blocks
        return self.kv.can_allocate(num_new + kept_free, matched)

    def may_reserve(self, priority: int, num_tokens: int, now: float) -> str | None:
        """Return why no reservation for ``num_tokens`` can be granted now, whatever is free, or None."""
        if self.num_holding + len(self.waiting) >= self._max_num_seqs:
            return f"max_num_seqs ({self._max_num_seqs}) requests are here"
        preempted = (request for request in self.waiting if request.status is DecodeStatus.PREEMPTED)
        if any(not self._by_priority or self.waiting.urgency(request, now) <= priority for request in preempted):
            return "preempted requests wait for blocks"
        if not self.order.may_be_passed(priority, num_tokens):
            return "prompts that came earlier wait for blocks"
        return None


def _next_end(request: DecodeRequest, in_flight: Mapping[DecodeRequest, Chunk]) -> int:
    """Return the position after the next token of a decode."""
    return (in_flight[request].end if request in in_flight else request.num_computed_tokens) + 1
