"""Blocks for decodes that grow, and for urgent prompts, at the cost of other decodes."""

from __future__ import annotations

from decode_node.admission import Admission
from decode_node.publishing import Publisher
from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from decode_node.schedule import Schedule
from decode_node.victim_order import victim_order
from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.node.headroom import ReservePolicy
from kvrelay.node.plans import PlanWriter
from kvstore.blocks.kv_cache import KVCache


class Preemption:
    """Preempts decodes. To be used while no plan is in flight: a plan's requests must not lose blocks.

    ``counts`` has the preemptions so far by cause: ``growth`` or ``priority``.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCache,
        block_size: int,
        requests: Requests,
        admission: Admission,
        reserve: ReservePolicy,
        publisher: Publisher,
        plans: PlanWriter,
    ) -> None:
        self._kv = kv
        self._block_size = block_size
        self._requests = requests
        self._admission = admission
        self._reserve = reserve
        self._publisher = publisher
        self._plans = plans
        self._order = victim_order(config)
        self.counts = {"growth": 0, "priority": 0}

    # ------------------------------------------------------------ growth

    def make_room(self, schedule: Schedule, now: float, *, is_staging: bool) -> set[DecodeRequest]:
        """Give every decode the block that its next token needs, and preempt others if there are too few.

        Returns the decodes that must sit this step out. One that decodes alone does so while others have blocks that
        cannot be taken (their KV is being received or computed; they will decode soon); if there are no others,
        it exceeds the pool. All that need blocks do so while ``is_staging``, when blocks of earlier victims are copied
        for the store: those will be free before another victim's would help.
        """
        size = self._block_size
        decoding = self._requests.decoding
        need_block = [request for request in decoding if len(request.token_ids) > len(request.block_table) * size]
        if not need_block:
            return set()
        if not self._kv.can_allocate(len(need_block)):
            if is_staging:
                return set(need_block)
            need_block = self._preempt_for_growth(schedule, need_block, now)
        if not self._kv.can_allocate(len(need_block)):
            if self._kv.num_referenced == len(need_block[0].block_table):
                schedule.exceeds_pool = need_block[0]
            return set(need_block)
        for request, block in zip(need_block, self._kv.allocate(len(need_block)), strict=True):
            request.block_table.append(block)
        return set()

    def _preempt_for_growth(
        self, schedule: Schedule, need_block: list[DecodeRequest], now: float
    ) -> list[DecodeRequest]:
        """Preempt until those of ``need_block`` that stay can grow; return those. One decode always stays."""
        num_decodes = len(self._requests.decoding)
        still_needed = set(need_block)
        victims: list[DecodeRequest] = []
        for victim in self._order(list(self._requests.decoding))[: num_decodes - 1]:
            room = self._reserve.room_blocks(num_decodes - len(victims)) if victims else 0
            if self._kv.can_allocate(len(still_needed) + room):
                break
            still_needed.discard(victim)
            victims.append(victim)
            self._release_victim(victim)
        self._requeue(victims, "growth", schedule, now)
        return [request for request in need_block if request in still_needed]

    # ------------------------------------------------------------ priority

    def preempt_for_priority(self, schedule: Schedule, urgent: DecodeRequest, now: float) -> None:
        """Preempt decodes less urgent than ``urgent`` if that lets it in at the next step."""
        matched, num_new = self._admission.blocks_of(urgent)
        victims: list[DecodeRequest] = []
        for victim in self.displaced(urgent, now):
            victims.append(victim)
            self._release_victim(victim)
            if self._admission.fits(urgent, num_new, matched, victims):
                break
        self._requeue(victims, "priority", schedule, now)

    def displaced(self, urgent: DecodeRequest, now: float) -> list[DecodeRequest]:
        """Return decodes whose blocks would let ``urgent`` in; none if it fits as it is, or would not fit then.

        They are less urgent in the order of the queue too: a victim that had waited longer would be before ``urgent``
        there again, and the two would change places at every step.
        """
        matched, num_new = self._admission.blocks_of(urgent)
        if self._admission.fits(urgent, num_new, matched):
            return []
        decoding, waiting = self._requests.decoding, self._requests.waiting
        urgency = waiting.urgency(urgent, now)
        victims = [
            victim
            for victim in self._order(list(decoding))
            if victim.priority > urgent.priority and waiting.urgency(victim, now) > urgency
        ]
        victims = victims[: len(decoding) - 1]
        num_freed = sum(len(victim.block_table) for victim in victims)
        return victims if self._kv.can_allocate(num_new - num_freed, matched) else []

    # ------------------------------------------------------------ both

    def _release_victim(self, victim: DecodeRequest) -> None:
        """Take the blocks of ``victim``. Full ones stay matchable until they are evicted."""
        self._publisher.publish(victim)
        self._kv.unpin(victim.block_table)
        victim.take_blocks(())
        self._plans.leave(victim)
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1

    def _requeue(self, victims: list[DecodeRequest], cause: str, schedule: Schedule, now: float) -> None:
        """Let the victims of one step wait, the one that arrived first before the others."""
        if victims:
            self.counts[cause] += len(victims)
            for victim in self._requests.waiting.requeue_order(victims):
                self._requests.move(victim, DecodeStatus.PREEMPTED, now)
            schedule.preempted += victims
            self._reserve.preempted(list(self._requests.decoding))
