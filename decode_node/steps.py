"""Steps on D: starting them, and taking what they sampled."""

from __future__ import annotations

from collections import defaultdict

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from decode_node.resume_policy import ReloadPolicy
from decode_node.schedule import Schedule
from decode_node.scheduler import Scheduler
from decode_node.storage import Storage
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.errors import NeverFitsError
from kvrelay.machine.contract import RunStep, StepDone, StepFailed
from kvrelay.machine.outbox import Outbox
from kvrelay.machine.speed import Speed
from kvrelay.node.endings import Endings
from kvrelay.node.in_flight import PlanInFlight
from kvrelay.node.plans import Chunk
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed
from kvrelay.protocol.messages.node_to_router import RequestOutput, TokensOut


class Steps:
    """Plans steps as long as the engine takes more. ``counters`` only grow."""

    def __init__(
        self,
        node: NodeConfig,
        scheduler: Scheduler,
        requests: Requests,
        endings: Endings[DecodeRequest, DecodeStatus],
        storage: Storage,
        reload_policy: ReloadPolicy,
        outbox: Outbox,
    ) -> None:
        self._node = node
        self._scheduler = scheduler
        self._requests = requests
        self._endings = endings
        self._storage = storage
        self._reload_policy = reload_policy
        self._outbox = outbox
        self._number = 0
        self._last_ended_s = 0.0
        self.counters = dict.fromkeys(
            (
                "steps",
                "decode_tokens",
                "prefill_tokens",
                "draft_tokens",
                "accepted_draft_tokens",
                "finished_stop",
                "finished_length",
            ),
            0.0,
        )
        self.prefill_speed = Speed()
        """Prompt tokens computed per second of a step that computes any, whatever else it computes."""

    # ------------------------------------------------------------ starting

    def start(self) -> None:
        """Plan as many steps as the engine takes, as long as there is anything to compute."""
        while self._scheduler.in_flight.has_room:
            schedule = self.start_one()
            if not schedule.chunks and schedule.exceeds_pool is None:  # its blocks are for those who wait
                return

    def start_one(self) -> Schedule:
        """Plan the next step, and have it computed if there is anything in it."""
        scheduler, now = self._scheduler, self._outbox.now
        schedule = scheduler.schedule_ahead(now) if scheduler.in_flight else scheduler.schedule(now)
        for request in schedule.preempted:
            request.mark("preempted", now)
            self._storage.preempted(request)
        for loading in schedule.loading:
            self._storage.load(loading)
        for request in schedule.admitted:
            request.mark("prefill", now)
        if schedule.exceeds_pool is not None:
            self._fail_exceeds_pool(schedule.exceeds_pool)
        if schedule.chunks:
            self._submit(schedule)
        return schedule

    def _submit(self, schedule: Schedule) -> None:
        self._number += 1
        plan = self._scheduler.plans.write(self._number, schedule.requests, schedule.chunks)
        self._scheduler.in_flight.begin(PlanInFlight(plan, schedule.requests, schedule.chunks, self._outbox.now))
        self._outbox.do(RunStep(plan))

    def _fail_exceeds_pool(self, request: DecodeRequest) -> None:
        num_blocks = len(request.block_table)
        message = f"the KV cache of {self._node.name} is full with the {num_blocks} blocks of this request alone"
        self._endings.fail(request, ErrorInfo.of(NeverFitsError(message)))

    # ------------------------------------------------------------ results

    def ended(self, event: StepDone | StepFailed) -> None:
        """Take the outcome of each sequence; each router gets the tokens that are its own in one message."""
        ended = self._scheduler.in_flight.end(event)
        self.counters["steps"] += 1
        step_s = self._measure(event, ended)
        num_outputs = 0
        outputs: defaultdict[PeerId, list[RequestOutput]] = defaultdict(list)
        for request, chunk, outcome in zip(ended.requests, ended.chunks, ended.outcomes(event), strict=True):
            if request.is_over:
                self._endings.end_if_unused(request)
            elif isinstance(outcome, SequenceFailed):
                self._endings.fail(request, ErrorInfo.of(outcome.error))
            elif output := self._computed(request, chunk, outcome):
                outputs[request.spec.router].append(output)
                num_outputs += 1
        if num_outputs:
            self._endings.stages.step(step_s, num_outputs)
        for router, its in outputs.items():
            self.counters["decode_tokens"] += sum([len(output.token_ids) for output in its])
            self._outbox.send(router, TokensOut(outputs=its))

    def _measure(self, event: StepDone | StepFailed, ended: PlanInFlight[DecodeRequest]) -> float:
        """Return the seconds of the step. Note how fast prompts were computed in it, unless it failed, maybe at once.

        To compare computing with reading from the store, only steps count that computed hardly anything else.
        """
        prefilling, num_prefill = self._requests.prefilling, 0
        if prefilling and isinstance(event, StepDone):
            chunks = zip(ended.requests, ended.chunks, strict=True)
            num_prefill = sum(chunk.num_tokens for request, chunk in chunks if request in prefilling)
        seconds = ended.seconds(self._last_ended_s, self._outbox.now)
        if num_prefill:
            self.prefill_speed.add(num_prefill, seconds, self._outbox.now)
        if num_prefill > len(ended.chunks):
            self._reload_policy.prefill_speed.add(num_prefill, seconds, self._outbox.now)
        self._last_ended_s = self._outbox.now
        return seconds

    def _computed(self, request: DecodeRequest, chunk: Chunk, sampled: SampledTokens) -> RequestOutput | None:
        """Take tokens whose KV is good, and what was sampled after them."""
        num_rejected = 0 if chunk.drafts is None else self._rejected(request, chunk.drafts, sampled)
        request.num_computed_tokens = chunk.start + chunk.num_tokens - num_rejected
        if request in self._requests.prefilling:
            self._chunk_done(request, chunk.num_tokens, sampled)
        if not sampled.token_ids:
            return None
        output = request.take(sampled)
        if output.finish_reason is not None:
            self.counters[f"finished_{output.finish_reason}"] += 1
            self._finished(request)
        return output

    def _rejected(self, request: DecodeRequest, drafts: tuple[int, ...], sampled: SampledTokens) -> int:
        """Count the drafts of one request in one step; return how many were wrong."""
        num_accepted = len(sampled.token_ids) - 1
        self._scheduler.plans.accepted(request, num_accepted)
        self.counters["draft_tokens"] += len(drafts)
        self.counters["accepted_draft_tokens"] += num_accepted
        return len(drafts) - num_accepted

    def _chunk_done(self, request: DecodeRequest, num_tokens: int, sampled: SampledTokens) -> None:
        self.counters["prefill_tokens"] += num_tokens
        self._scheduler.publisher.publish(request)
        for message in request.prompt_logprobs_out(sampled) if sampled.prompt_logprobs else ():
            self._outbox.send(request.spec.router, message)
        if request.num_computed_tokens == len(request.token_ids):
            request.prompt_computed()
            self._requests.move(request, DecodeStatus.RUNNING_DECODE, self._outbox.now)
            request.mark("decode", self._outbox.now)

    def _finished(self, request: DecodeRequest) -> None:
        request.mark("done", self._outbox.now)
        if self._node.cache.output_caching:
            self._scheduler.publisher.publish(request)
        self._storage.finished(request)
        self._endings.close(request, "finished")
