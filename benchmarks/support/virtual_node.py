"""One decode or mixed node in virtual time: the real state machine, step times of a cost model, a closed-loop load.

The rest of the cluster is played here, and does everything at once but for what is said: a prefill node that is never
short of anything asks for blocks, asks again when it was refused, and hands over when the prompt's compute and
transfer would be over.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
from support.cost_model import COSTS, TRANSFER_TOKEN_S

from decode_node.machine import DecodeMachine
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.engine.fake import step_seconds
from kvrelay.machine.contract import Received, RunStep, Send, StepDone
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import MESSAGER, ROUTER, NodeId, PeerId
from kvrelay.protocol.messages.base import LinkAddress, Message
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationRefused
from kvrelay.protocol.messages.engine import NewSequence, SampledTokens, ScheduledTokens, StepPlan, StepResult
from kvrelay.protocol.messages.messager_to_node import KVArrived, KVExpected, MessagerReady
from kvrelay.protocol.messages.node_to_messager import ExpectKV
from kvrelay.protocol.messages.node_to_router import Register, RequestFailed, TokensOut
from kvrelay.protocol.messages.prefill_to_decode import HandOff, ReserveBlocks
from kvrelay.protocol.messages.router_to_node import Generate
from kvrelay.protocol.request import RequestSpec

TOKEN, EOS = 7, 1
PREFILL_NODE = "p0#1"

Event: TypeAlias = StepDone | Received


@dataclass(frozen=True)
class Job:
    """A request, with the hashes of its prompt's blocks, and after how many output tokens it ends."""

    spec: RequestSpec
    block_hashes: list[bytes]
    num_output_tokens: int

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.spec.prompt_token_ids)


@dataclass
class Measured:
    """What one run gave, in virtual seconds. ``busy``: until the last request was sent. ``step``: in each step."""

    busy_s: float = 0.0
    busy_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    total_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    step_decodes: list[int] = field(default_factory=list)
    step_kept_free: list[int] = field(default_factory=list)


def registration(config: NodeConfig, geometry: KVGeometry) -> Register:
    return Register(
        node_id=NodeId(config.name),
        incarnation="1",
        role=config.role,
        address="",
        pid=0,
        model="m",
        max_model_len=1 << 20,
        max_num_seqs=config.scheduler.max_num_seqs,
        num_blocks=config.cache.fixed_num_blocks,
        geometry=geometry,
    )


class VirtualNode:
    """The node of ``config``, and ``num_clients`` clients that send ``jobs`` one after the other."""

    def __init__(self, config: NodeConfig, geometry: KVGeometry, jobs: Sequence[Job], num_clients: int) -> None:
        self._machine = DecodeMachine(config, registration(config, geometry))
        self._measured = Measured()
        self._takes_over = config.role == "decode"
        self._num_clients = num_clients
        self._jobs = {job.spec.request_id: job for job in jobs}
        self._todo = iter(jobs)
        self._num_output_tokens = 0
        self._sent_s: dict[str, float] = {}
        self._last_token_s: dict[str, float] = {}
        self._sequences: dict[int, NewSequence] = {}
        self._events: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._now = 0.0

    def run(self) -> Measured:
        """Serve every request. Raises LocalProtocolError if the node is not at rest in the end."""
        link = LinkAddress(peer=PeerId("m"), host_id="h", tcp="tcp://127.0.0.1:1", ipc="")
        self._handle(Received(MESSAGER, MessagerReady(link=link)))
        for _ in range(self._num_clients):
            self._send_next()
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            self._handle(event)
        self._machine.assert_quiescent()
        counters, measured = self._machine.load().counters, self._measured
        num_prompt_tokens = 0 if self._takes_over else sum(job.num_prompt_tokens for job in self._jobs.values())
        measured.total_s = self._now
        measured.preemptions = int(counters["preemptions"])
        measured.recomputed_tokens = int(counters["prefill_tokens"]) - num_prompt_tokens
        return measured

    def _after(self, delay_s: float, event: Event) -> None:
        heapq.heappush(self._events, (self._now + delay_s, next(self._order), event))

    def _handle(self, event: Event) -> None:
        for action in self._machine.handle(event, self._now):
            match action:
                case RunStep(plan=plan):
                    self._run_step(plan)
                case Send(message=message):
                    self._take(message)

    def _take(self, message: Message) -> None:
        """Do what the rest of the cluster does with ``message``."""
        match message:
            case TokensOut():
                self._deliver(message)
            case ExpectKV(request_id=request_id, epoch=epoch):
                self._after(0.0, Received(MESSAGER, KVExpected(request_id=request_id, epoch=epoch)))
            case BlocksReserved(request_id=request_id):
                self._hand_over(self._jobs[request_id])
            case ReservationRefused(request_id=request_id, retry_after_s=float(retry_after_s)):
                self._after(retry_after_s, self._request(self._jobs[request_id]))
            case RequestFailed(error=error):
                raise RuntimeError(f"the node failed a request: {error}")

    # ------------------------------------------------------------ clients and prefill nodes

    def _send_next(self) -> None:
        job = next(self._todo, None)
        if job is not None:
            self._after(0.0, self._request(job))
            self._sent_s[job.spec.request_id] = self._now
            self._measured.busy_s, self._measured.busy_tokens = self._now, self._num_output_tokens

    def _request(self, job: Job) -> Event:
        if not self._takes_over:
            return Received(ROUTER, Generate(request=job.spec))
        reserve = ReserveBlocks(
            request_id=job.spec.request_id,
            epoch=job.spec.epoch,
            block_hashes=list(job.block_hashes),
            num_tokens=job.num_prompt_tokens,
            max_tokens=job.spec.sampling.max_tokens,
        )
        return Received(PeerId(PREFILL_NODE), reserve)

    def _hand_over(self, job: Job) -> None:
        delay_s = job.num_prompt_tokens * (COSTS.prefill_token_s + TRANSFER_TOKEN_S)
        spec = msgspec.structs.replace(job.spec, output_token_ids=[TOKEN])
        self._after(delay_s, Received(PeerId(PREFILL_NODE), HandOff(request=spec, num_cached_tokens=0)))
        arrived = KVArrived(request_id=spec.request_id, epoch=spec.epoch, num_bytes=0)
        self._after(delay_s, Received(MESSAGER, arrived))

    def _deliver(self, message: TokensOut) -> None:
        itl_s, last_s, now = self._measured.itl_s, self._last_token_s, self._now
        self._num_output_tokens += len(message.outputs)
        for output in message.outputs:
            if output.request_id in last_s:
                itl_s.append(now - last_s[output.request_id])
            else:
                self._measured.ttft_s.append(now - self._sent_s[output.request_id])
            last_s[output.request_id] = now
            if output.finish_reason is not None:
                self._send_next()

    # ------------------------------------------------------------ the engine

    def _run_step(self, plan: StepPlan) -> None:
        self._measured.step_decodes.append(sum(item.samples for item in plan.batch))
        self._measured.step_kept_free.append(self._machine.scheduler.admission.headroom_blocks())
        for new in plan.new:
            self._sequences[new.id] = new
        result = StepResult(step=plan.step, outcomes={item.id: self._sample(item) for item in plan.batch})
        self._after(step_seconds(COSTS, plan.batch), StepDone(result))

    def _sample(self, item: ScheduledTokens) -> SampledTokens:
        if not item.samples:
            return SampledTokens([], [])
        sequence = self._sequences[item.id]
        num_output_tokens = item.start + item.num_tokens + 1 - sequence.num_prompt_tokens
        is_last = num_output_tokens >= self._jobs[sequence.request_id].num_output_tokens
        return SampledTokens([EOS if is_last else TOKEN], [])
