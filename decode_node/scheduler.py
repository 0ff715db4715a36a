"""What a decode or mixed node computes in a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decode_node.admission import Admission
from decode_node.decodes import Decodes
from decode_node.preemption import Preemption
from decode_node.publishing import Publisher
from decode_node.request import DecodeRequest
from decode_node.requests import Requests
from decode_node.resume_policy import ReloadPolicy
from decode_node.schedule import Schedule
from kvrelay.config.cluster_config import SchedulerConfig, SpeculativeConfig
from kvrelay.node.headroom import reserve_policy
from kvrelay.node.in_flight import PlansInFlight
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.protocol.block_hash import BlockHasher
from kvstore.blocks.kv_cache import KVCache
from kvstore.offload.kv_offloader import KVOffloader


class Scheduler:
    """Decides each step: decodes first, then chunks of prompts, newly admitted ones among them.

    ``admission`` gives blocks, ``preemption`` takes them back; neither touches requests of plans in flight. The caller
    writes the plan, starts the reads of ``Schedule.loading`` and takes the results.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        speculative: SpeculativeConfig,
        kv: KVCache,
        hasher: BlockHasher,
        requests: Requests,
        reload_policy: ReloadPolicy,
        offloader: KVOffloader[Any],
        max_plans_in_flight: int = 1,
    ) -> None:
        self.plans = PlanWriter()
        self.in_flight: PlansInFlight[DecodeRequest] = PlansInFlight(max_plans_in_flight)
        block_size = hasher.block_size
        self.reserve = reserve_policy(config, block_size)
        self.publisher = Publisher(kv, hasher, requests, self.plans, self.in_flight)
        self.admission = Admission(config, kv, block_size, requests, self.reserve, reload_policy)
        self.preemption = Preemption(
            config, kv, block_size, requests, self.admission, self.reserve, self.publisher, self.plans
        )
        self._requests = requests
        self._offloader = offloader
        self._decodes = Decodes(config, speculative, kv, block_size)
        self._token_budget = config.max_num_batched_tokens
        self._by_priority = config.enable_priority_scheduling

    def schedule(self, now: float) -> Schedule:
        """Decide a step with no plan in flight: decodes, then prompts, newcomers too if no request was preempted."""
        self.publisher.share_late()
        requests, schedule = self._requests, Schedule()
        stalled = self.preemption.make_room(schedule, now, is_staging=self._offloader.is_staging)
        if self._by_priority and requests.waiting and not schedule.preempted:
            self.preemption.preempt_for_priority(schedule, requests.waiting.ordered(now)[0], now)
        decodes = self._decodes.within_budget([request for request in requests.decoding if request not in stalled])
        self._fill(schedule, decodes, {}, now)
        if not schedule.chunks and not requests.num_holding and not requests.waiting:
            self.reserve.idle()
        return schedule

    def schedule_ahead(self, now: float) -> Schedule:
        """Decide the step after the plans in flight, as far as it depends on none of their results but the next tokens.

        No request is preempted for it. If one would have to be, it is empty: ``schedule`` decides when the results are
        in.
        """
        requests, schedule, in_flight = self._requests, Schedule(), self.in_flight.chunks()
        waiting = requests.waiting
        if self._by_priority and waiting and self.preemption.displaced(waiting.ordered(now)[0], now):
            return schedule
        decodes = self._decodes.within_budget(self._decodes.after(in_flight, requests.decoding, requests.prefilling))
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

    def _add_prompts(
        self, schedule: Schedule, budget: int, in_flight: Mapping[DecodeRequest, Chunk], now: float
    ) -> None:
        """Add the next chunks of prompts as far as the budget goes, in order; those that wait get their blocks now.

        No request gets blocks in a step that preempted one, nor after a request for which there are too few.
        """
        num_decodes = len(schedule.chunks)
        prefilling, order = self._requests.prefilling, self._requests.order
        may_admit = not schedule.preempted and self.admission.has_seats
        waiting = self._requests.waiting if may_admit else ()
        if not prefilling and not waiting:  # so it is in most steps
            return
        for request in order.merged(prefilling, waiting, now):
            if budget <= 0:
                break
            if request not in prefilling and may_admit:
                may_admit = self.admission.admit(request, schedule, now)
            if request in prefilling:
                start = in_flight[request].end if request in in_flight else request.next_position
                if start < len(request.token_ids):  # else its last chunk is in flight
                    budget -= schedule.add(request, start, budget)
        chunks = zip(schedule.requests[num_decodes:], schedule.chunks[num_decodes:], strict=True)
        order.computing(((request, chunk.num_tokens) for request, chunk in chunks), now)


def _next_end(request: DecodeRequest, in_flight: Mapping[DecodeRequest, Chunk]) -> int:
    """Return the position after the next token of a decode."""
    return (in_flight[request].end if request in in_flight else request.num_computed_tokens) + 1
