"""One prefill node in virtual time: the real state machine, step times of a cost model.

The rest of the cluster is played here: decode nodes that always have room, transfers that take as long as the KV is,
and answers whose tokens come at a fixed rate.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field
from typing import TypeAlias
from unittest.mock import patch

from support.chats import ANSWER_MEAN, EOS, MAX_TOKENS, VOCAB_SIZE
from support.cost_model import COSTS, TRANSFER_TOKEN_S
from support.prompt_loads import Client, Load
from support.virtual_node import TOKEN, registration

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.engine.fake import step_seconds
from kvrelay.machine.contract import Received, RunStep, Send, StepDone
from kvrelay.node import prefill_order
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import MESSAGER, ROUTER, BlockId, PeerId, RequestId, SequenceId
from kvrelay.protocol.messages.base import LinkAddress, Message, NodeAddress
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved
from kvrelay.protocol.messages.engine import SampledTokens, SequenceOutcome, StepPlan, StepResult
from kvrelay.protocol.messages.messager_to_node import MessagerReady, TransferDone
from kvrelay.protocol.messages.node_to_router import RequestFailed, TokensOut
from kvrelay.protocol.messages.prefill_to_decode import ReserveBlocks
from kvrelay.protocol.messages.router_to_node import Prefill
from kvrelay.protocol.request import RequestSpec, SamplingParams
from prefill_node.machine import PrefillMachine

DECODE_NODE = NodeAddress(peer=PeerId("d0#1"), address="")
LINK = LinkAddress(peer=PeerId("m"), host_id="h", tcp="tcp://127.0.0.1:1", ipc="")
OUTPUT_TOKEN_S = 0.02
"""Between two tokens of an answer."""

Event: TypeAlias = StepDone | Received


@dataclass
class Turn:
    """One prompt on its way; times are virtual seconds."""

    client: Client
    prompt: list[int]
    message: int
    sent_s: float
    first_chunk_s: float = -1.0
    first_token_s: float = -1.0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.sent_s

    @property
    def wait_s(self) -> float:
        return self.first_chunk_s - self.sent_s


@dataclass
class Measured:
    """What one run gave.

    ``most_begun``: prompts at once that were computed in part. ``num_switches``: how often such a prompt had no chunk
    in the next step.
    """

    turns: list[Turn] = field(default_factory=list)
    total_s: float = 0.0
    num_output_tokens: int = 0
    most_begun: int = 0
    most_used_blocks: int = 0
    num_switches: int = 0
    num_steps: int = 0


class VirtualPrefillNode:
    """The prefill node of ``config`` under ``load``; ``begun_weight`` is that of ``ShortestFirst``."""

    def __init__(self, config: NodeConfig, geometry: KVGeometry, load: Load, begun_weight: float) -> None:
        with patch.object(prefill_order, "BEGUN_WEIGHT", begun_weight):
            self.machine = PrefillMachine(config, registration(config, geometry))
        self._load = load
        self._waiting = iter(load.clients)
        self._turns: dict[str, Turn] = {}
        self._names: dict[int, str] = {}
        self._begun: dict[str, None] = {}
        self._measured = Measured()
        self._events: list[tuple[float, int, Event | Turn]] = []
        self._order = itertools.count()
        self._now = 0.0

    def run(self) -> Measured:
        """Serve every prompt. Raises LocalProtocolError if the node is not at rest in the end."""
        self._handle(Received(MESSAGER, MessagerReady(link=LINK)))
        for _ in range(self._load.num_at_once):
            self._next_client()
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            if isinstance(event, Turn):
                self._send(event)
            else:
                self._handle(event)
        self.machine.assert_quiescent()
        self._measured.total_s = self._now
        return self._measured

    def _after(self, delay_s: float, event: Event | Turn) -> None:
        heapq.heappush(self._events, (self._now + delay_s, next(self._order), event))

    def _handle(self, event: Event) -> None:
        for action in self.machine.handle(event, self._now):
            match action:
                case RunStep(plan=plan):
                    self._run_step(plan)
                case Send(message=message):
                    self._take(message)

    # ------------------------------------------------------------ clients

    def _next_client(self) -> None:
        client = next(self._waiting, None)
        if client is not None:
            sent_s = max(self._now, client.start_s)
            self._after(sent_s - self._now, Turn(client, client.messages[0], 0, sent_s))

    def _send(self, turn: Turn) -> None:
        name = f"r{len(self._measured.turns)}"
        self._measured.turns.append(turn)
        self._turns[name] = turn
        sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=0)
        spec = RequestSpec(request_id=RequestId(name), epoch=1, prompt_token_ids=turn.prompt, sampling=sampling)
        self._handle(Received(ROUTER, Prefill(request=spec, decode_node=DECODE_NODE)))

    def _answered(self, turn: Turn) -> None:
        """The prompt is computed: its answer ends some time later, and the client goes on."""
        rng = random.Random(sum(turn.prompt))  # the answer depends on the prompt alone, so every run does the same work
        num_tokens = self._load.max_tokens or min(MAX_TOKENS, 1 + round(rng.expovariate(1.0 / ANSWER_MEAN)))
        self._measured.num_output_tokens += num_tokens
        place = turn.message + 1
        if place == len(turn.client.messages):
            self._next_client()
            return
        answer = [rng.randrange(EOS + 1, VOCAB_SIZE) for _ in range(num_tokens)]
        delay_s = num_tokens * OUTPUT_TOKEN_S
        prompt = [*turn.prompt, *answer, *turn.client.messages[place]]
        self._after(delay_s, Turn(turn.client, prompt, place, self._now + delay_s))

    # ------------------------------------------------------------ the cluster

    def _take(self, message: Message) -> None:
        match message:
            case ReserveBlocks(request_id=name):
                reserved = BlocksReserved(
                    request_id=name, epoch=1, block_ids=[BlockId(0)], num_cached_blocks=0, link=LINK, lease_s=1e9
                )
                self._after(0.0, Received(DECODE_NODE.peer, reserved))
            case TokensOut(outputs=outputs):
                for output in outputs:
                    turn = self._turns[output.request_id]
                    turn.first_token_s = self._now
                    done = TransferDone(request_id=output.request_id, epoch=1, num_bytes=0, link="", layers=[])
                    self._after(len(turn.prompt) * TRANSFER_TOKEN_S, Received(MESSAGER, done))
                    self._answered(turn)
            case RequestFailed(error=error):
                raise RuntimeError(f"the node failed a request: {error}")

    def _run_step(self, plan: StepPlan) -> None:
        measured, before = self._measured, set(self._begun)
        self._names |= {new.id: new.request_id for new in plan.new}
        for item in plan.batch:
            name = self._names[item.id]
            turn = self._turns[name]
            if turn.first_chunk_s < 0:
                turn.first_chunk_s = self._now
            self._begun[name] = None
            if item.samples:
                del self._begun[name]
        scheduled = {self._names[item.id] for item in plan.batch}
        measured.num_switches += len(before - scheduled)
        measured.num_steps += 1
        measured.most_begun = max(measured.most_begun, len(self._begun))
        measured.most_used_blocks = max(measured.most_used_blocks, self.machine.kv.num_referenced)
        outcomes: dict[SequenceId, SequenceOutcome] = {
            item.id: SampledTokens([TOKEN] if item.samples else [], []) for item in plan.batch
        }
        self._after(step_seconds(COSTS, plan.batch), StepDone(StepResult(step=plan.step, outcomes=outcomes)))
