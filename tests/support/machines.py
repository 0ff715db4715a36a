"""One machine alone: a test says what it hears and looks at what it says."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

from decode_node.machine import DecodeMachine
from kvrelay.config.cluster_config import (
    CacheConfig,
    ClusterSettings,
    EngineConfig,
    NodeConfig,
    Role,
    SchedulerConfig,
    SpeculativeConfig,
    StorageConfig,
    TransferConfig,
)
from kvrelay.machine.contract import Received, RunStep, Send, Started, StepDone, TimerFired
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import MESSAGER, ROUTER, NodeId, PeerId, RequestId
from kvrelay.protocol.messages.base import LinkAddress, Message, NodeAddress
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome, StepPlan, StepResult
from kvrelay.protocol.messages.messager_to_node import KVCancelled, MessagerReady, TransferClosed
from kvrelay.protocol.messages.node_to_messager import CancelKV, CloseTransfer
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.request import RequestSpec, SamplingParams
from prefill_node.machine import PrefillMachine

M = TypeVar("M", bound=Message)

P0, D0, D1 = PeerId("p0#1"), PeerId("d0#1"), PeerId("d1#1")
D0_ADDRESS = NodeAddress(peer=D0, address="tcp://127.0.0.1:8300")
D1_ADDRESS = NodeAddress(peer=D1, address="tcp://127.0.0.1:8301")
LINK = LinkAddress(peer=PeerId("d0.messager#1"), host_id="host", tcp="tcp://127.0.0.1:9000", ipc="ipc:///d0")
BLOCK_SIZE = 4
VOCAB_SIZE = 1 << 20
LEASE_S, TIMEOUT_S, DRAIN_S = 8.0, 10.0, 20.0


def node_config(role: Role, **sections: dict[str, Any]) -> NodeConfig:
    """Return the config of a small node."""
    return NodeConfig(
        name="n0",
        role=role,
        port=8200,
        cache=CacheConfig(**{"block_size": BLOCK_SIZE, "num_blocks": 32, **sections.get("cache", {})}),
        scheduler=SchedulerConfig(**{"reserve_policy": "none", "watermark": 0.0, **sections.get("scheduler", {})}),
        speculative=SpeculativeConfig(**sections.get("speculative", {})),
        storage=StorageConfig(**sections.get("storage", {})),
        transfer=TransferConfig(lease_s=LEASE_S, timeout_s=TIMEOUT_S),
        engine=EngineConfig(kind="fake"),
        cluster=ClusterSettings(**{"drain_timeout_s": DRAIN_S, "self_check": "fatal", **sections.get("cluster", {})}),
    )


def registration(node: NodeConfig) -> Register:
    """Return what a node registers as."""
    return Register(
        node_id=NodeId(node.name),
        incarnation="1",
        role=node.role,
        address=node.address,
        pid=1,
        model="demo",
        max_model_len=4096,
        max_num_seqs=node.scheduler.max_num_seqs,
        num_blocks=node.cache.fixed_num_blocks,
        geometry=KVGeometry(2, 1, 8, node.cache.block_size, "uint8", "model"),
        vocab_size=VOCAB_SIZE,
    )


def spec(name: str = "r", prompt: int | list[int] = 10, max_tokens: int = 5, **options: Any) -> RequestSpec:
    """Return a request; ``prompt`` is its tokens, or how many."""
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, **options.pop("sampling", {}))
    tokens = prompt if isinstance(prompt, list) else list(range(prompt))
    return RequestSpec(
        request_id=RequestId(name), epoch=options.pop("epoch", 1), prompt_token_ids=tokens, sampling=sampling, **options
    )


class NodeHarness:
    """A node's machine. Its messager lets go of blocks when it is told to, unless ``messager_answers`` is off."""

    def __init__(self, role: Role, plans_in_flight: int = 1, **sections: Any) -> None:
        node = node_config(role, **sections)
        kind = PrefillMachine if role is Role.PREFILL else DecodeMachine
        self.machine: Any = kind(node, registration(node), plans_in_flight)
        self.now = 100.0
        self.messager_answers = True
        self.actions: list[object] = []
        self.plans: deque[StepPlan] = deque()
        self.names: dict[int, str] = {}
        self._plans_in_flight = plans_in_flight
        self.post(Started())
        if role is not Role.MIXED:
            self.receive(MESSAGER, MessagerReady(link=LINK))
        self.actions.clear()

    @property
    def plan(self) -> StepPlan | None:
        """The plan whose step runs."""
        return self.plans[0] if self.plans else None

    def planned(self) -> list[str]:
        """Return the requests of the step that runs."""
        return [self.names[item.id] for item in self.plans[0].batch]

    # ------------------------------------------------------------ telling

    def post(self, event: object) -> list[Any]:
        """Let the machine handle ``event``; return what it wants done."""
        actions = list(self.machine.handle(event, self.now))
        self.actions += actions
        for action in actions:
            match action:
                case RunStep(plan=plan):
                    self._take_plan(plan)
                case Send(peer="messager", message=message) if self.messager_answers:
                    self._answer(message)
        return actions

    def _take_plan(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        assert len(self.plans) <= self._plans_in_flight, "more plans than the engine takes"
        self.names |= {new.id: new.request_id for new in plan.new}

    def _answer(self, message: Message) -> None:
        match message:
            case CancelKV(request_id=request_id, epoch=epoch):
                self.receive(MESSAGER, KVCancelled(request_id=request_id, epoch=epoch))
            case CloseTransfer(request_id=request_id, epoch=epoch):
                self.receive(MESSAGER, TransferClosed(request_id=request_id, epoch=epoch))

    def receive(self, peer: str, message: Message) -> list[Any]:
        """Let a message come in."""
        return self.post(Received(PeerId(peer), message))

    def pass_time(self, seconds: float) -> list[Any]:
        """Let time pass and a heartbeat be due."""
        self.now += seconds
        return self.post(TimerFired("heartbeat"))

    def finish_step(self, *tokens: int) -> list[Any]:
        """End the running step; whoever samples gets the next of ``tokens``, or 7."""
        left = list(tokens)
        return self.end_step(
            [SampledTokens([left.pop(0) if left else 7] if item.samples else [], []) for item in self.plans[0].batch]
        )

    def fail_step(self, *names: str) -> list[Any]:
        """End the running step; the sequences of ``names`` (all, if there are none) fail, the others sample 7."""
        return self.end_step(
            [
                SequenceFailed("ValueError: broken")
                if not names or self.names[item.id] in names
                else SampledTokens([7] if item.samples else [], [])
                for item in self.plans[0].batch
            ]
        )

    def end_step(self, outcomes: Sequence[SequenceOutcome]) -> list[Any]:
        """End the running step with ``outcomes`` in the order of its batch."""
        return self.post(StepDone(result_of(self.plans.popleft(), outcomes)))

    def run_steps(self, limit: int = 1000) -> None:
        """Let all steps be computed until there is nothing left to do."""
        for _ in range(limit):
            if self.plan is None:
                return
            self.finish_step()
        raise AssertionError("it never ends")

    # ------------------------------------------------------------ looking

    def sent(self, kind: type[M], to: str | None = None) -> list[M]:
        """Return all messages of ``kind`` sent so far."""
        return sent(self.actions, kind, to)

    def did(self, kind: type[Any]) -> list[Any]:
        """Return all actions of ``kind`` so far."""
        return [action for action in self.actions if isinstance(action, kind)]

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        used: int = self.machine.kv.num_referenced
        return used


def result_of(plan: StepPlan, outcomes: Sequence[SequenceOutcome]) -> StepResult:
    """Return the result of ``plan`` with ``outcomes`` in the order of its batch."""
    by_id = {item.id: outcome for item, outcome in zip(plan.batch, outcomes, strict=True)}
    return StepResult(step=plan.step, outcomes=by_id)


def sent(actions: Sequence[object], kind: type[M], to: str | None = None) -> list[M]:
    """Return the messages of ``kind`` in ``actions``, to ``to`` or to anyone."""
    return [
        action.message
        for action in actions
        if isinstance(action, Send) and isinstance(action.message, kind) and to in (None, action.peer)
    ]


__all__ = [
    "BLOCK_SIZE",
    "D0",
    "D0_ADDRESS",
    "D1",
    "D1_ADDRESS",
    "DRAIN_S",
    "LEASE_S",
    "LINK",
    "MESSAGER",
    "P0",
    "ROUTER",
    "TIMEOUT_S",
    "VOCAB_SIZE",
    "NodeHarness",
    "node_config",
    "registration",
    "result_of",
    "sent",
    "spec",
]
