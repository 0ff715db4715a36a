"""Whatever arrives, no prompt is overtaken by more than ``prefill_overtake_tokens``, and all are computed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ids import block_ids
from support.machines import D0, D0_ADDRESS, LINK, MESSAGER, ROUTER, NodeHarness, spec

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved
from kvrelay.protocol.messages.engine import StepPlan
from kvrelay.protocol.messages.messager_to_node import TransferDone
from kvrelay.protocol.messages.node_to_router import RequestFailed, TokensOut
from kvrelay.protocol.messages.prefill_to_decode import ReserveBlocks
from kvrelay.protocol.messages.router_to_node import Abort, Generate, Prefill
from kvrelay.protocol.request import RequestSpec

BLOCK_SIZE, STEP_TOKENS = 4, 8


@dataclass
class Arrived:
    """One prompt as the referee sees it."""

    priority: int
    num_tokens: int
    overtaken: int = 0


@dataclass
class Referee:
    """Counts from the plans alone by how many tokens each prompt has been overtaken; knows nothing of the order."""

    unfinished: dict[str, Arrived] = field(default_factory=dict)
    most_overtaken: int = 0

    def watch(self, plan: StepPlan, names: dict[int, str]) -> None:
        """Take in a step that has just been decided, of sequences that belong to the requests ``names``."""
        computed = {names[item.id]: item for item in plan.batch}
        finished = {name for name, item in computed.items() if item.samples}
        for (name, prompt), (later, other) in itertools.combinations(self.unfinished.items(), 2):
            if later in computed and prompt.priority == other.priority and name not in finished:
                prompt.overtaken += computed[later].num_tokens
                self.most_overtaken = max(self.most_overtaken, prompt.overtaken)
        for name in finished:
            self.unfinished.pop(name, None)


class Node:
    """A prefill or mixed node with a small pool, whose transfers end when the test says so."""

    def __init__(self, role: Role, num_blocks: int, **scheduler: Any) -> None:
        sections = {"max_num_batched_tokens": STEP_TOKENS, "prefill_order": "shortest_first", **scheduler}
        self.role = role
        self.harness = NodeHarness(role, cache={"num_blocks": num_blocks, "block_size": BLOCK_SIZE}, scheduler=sections)
        self.referee = Referee()
        self.transfers: list[str] = []
        self._numbers = itertools.count()
        self._seen = 0

    def arrive(self, num_tokens: int, common: int = 0, priority: int = 0) -> str:
        """Let a prompt come that begins with the first ``common`` tokens of a system prompt."""
        number = next(self._numbers)
        own = [1000 * (number + 1) + place for place in range(num_tokens)]
        prompt = [*range(min(common, num_tokens)), *own][:num_tokens]
        request = spec(f"r{number}", prompt, max_tokens=2 if self.role is Role.PREFILL else 1, priority=priority)
        self.referee.unfinished[request.request_id] = Arrived(priority, num_tokens)
        self._hear(request)
        return request.request_id

    def _hear(self, request: RequestSpec) -> None:
        is_prefill = self.role is Role.PREFILL
        message = Prefill(request=request, decode_node=D0_ADDRESS) if is_prefill else Generate(request=request)
        self.harness.receive(ROUTER, message)
        self._look()

    def step(self) -> None:
        """Let the running step end, if there is one."""
        if self.harness.plan is not None:
            self.harness.finish_step()
            self._look()

    def end_transfer(self) -> None:
        """Let D have all KV of the prompt that waits for that longest, if one does."""
        if self.transfers:
            name = self.transfers.pop(0)
            self.harness.receive(
                MESSAGER, TransferDone(request_id=RequestId(name), epoch=1, num_bytes=0, link="", layers=[])
            )
            self._look()

    def abort(self, place: int) -> None:
        """Give up a prompt that is not computed yet."""
        names = list(self.referee.unfinished)
        if names:
            name = names[place % len(names)]
            del self.referee.unfinished[name]
            self.harness.receive(ROUTER, Abort(request_id=RequestId(name), epoch=1))
            self._look()

    def finish(self) -> None:
        """Let everything that is there be computed and sent."""
        for _ in range(10_000):
            if self.harness.plan is None and not self.transfers:
                break
            self.step()
            self.end_transfer()
        assert not self.referee.unfinished
        self.harness.machine.assert_quiescent()

    def _look(self) -> None:
        actions, self._seen = self.harness.actions[self._seen :], len(self.harness.actions)
        for action in actions:
            match getattr(action, "message", None):
                case ReserveBlocks(request_id=name):
                    reserved = BlocksReserved(
                        request_id=name, epoch=1, block_ids=block_ids(0), num_cached_blocks=0, link=LINK, lease_s=1e9
                    )
                    self.harness.receive(D0, reserved)
                case TokensOut(outputs=outputs) if self.role is Role.PREFILL:
                    self.transfers += [output.request_id for output in outputs]
                case RequestFailed(error=error):
                    raise AssertionError(error)
            plan = getattr(action, "plan", None)
            if plan is not None:
                self.referee.watch(plan, self.harness.names)


EVENTS = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 60), st.sampled_from([0, 0, 8, 24]), st.integers(0, 1)),
    st.tuples(st.just("undercut"), st.integers(1, 4), st.just(0), st.just(0)),
    st.tuples(st.just("step")),
    st.tuples(st.just("step")),
    st.tuples(st.just("end transfer")),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 9.0, 25.0])),
    st.tuples(st.just("abort"), st.integers(0, 10)),
)
"""``undercut`` lets prompts come that are shorter than what the oldest has left: the worst for that one."""


@pytest.mark.parametrize("role", [Role.PREFILL, Role.MIXED])
@pytest.mark.parametrize("by_priority", [False, True])
@settings(max_examples=150)
@given(
    events=st.lists(EVENTS, max_size=60),
    overtake=st.sampled_from([0, 8, 12, 30, 100]),
    blocks=st.sampled_from([15, 17, 20, 60]),
)
def test_no_arrivals_overtake_a_prompt_by_more_than_the_bound(
    role: Role, by_priority: bool, events: list[tuple[Any, ...]], overtake: int, blocks: int
) -> None:
    node = Node(role, blocks, prefill_overtake_tokens=overtake, enable_priority_scheduling=by_priority)
    for kind, *details in events:
        match kind:
            case "arrive":
                node.arrive(*details)
            case "undercut":
                oldest = next(iter(node.referee.unfinished.values()), None)
                for number in range(details[0]):
                    node.arrive(max(1, (oldest.num_tokens if oldest else 9) // 2 - 1 - number))
            case "step":
                node.step()
            case "end transfer":
                node.end_transfer()
            case "wait":
                node.harness.now += details[0]  # seconds: the urgency of those that are there rises
            case "abort":
                node.abort(details[0])
    node.finish()
    assert node.referee.most_overtaken <= overtake


@pytest.mark.parametrize("role", [Role.PREFILL, Role.MIXED])
@pytest.mark.parametrize("overtake", [16, 40, 200])
def test_short_prompts_without_end_delay_a_long_one_by_the_bound_and_no_more(role: Role, overtake: int) -> None:
    """Each step's worth of them comes before the step: shortest first alone would never get to the long prompt."""
    node = Node(role, 64, prefill_overtake_tokens=overtake)
    node.arrive(4)
    long = node.arrive(80)
    num_steps = 0
    while long in node.referee.unfinished:
        node.arrive(4)
        node.arrive(4)
        node.step()
        node.end_transfer()
        node.end_transfer()
        num_steps += 1
        assert num_steps <= (overtake + 80) // STEP_TOKENS + 2
    assert max(1, overtake - 3 * STEP_TOKENS) <= node.referee.most_overtaken <= overtake
    node.finish()


@pytest.mark.parametrize("role", [Role.PREFILL, Role.MIXED])
@pytest.mark.parametrize("length", [3, 5, 7, 12])
@pytest.mark.parametrize("overtake", [20, 40, 41, 50])
def test_a_long_prompt_gets_blocks_though_short_ones_take_what_becomes_free(
    role: Role, length: int, overtake: int
) -> None:
    """The pool is never half empty: first come for blocks alone would keep the long prompt out for ever."""
    node = Node(role, 20, prefill_overtake_tokens=overtake)
    for _ in range(4):
        node.arrive(12)
    long = node.arrive(76)
    for _ in range(60):
        for _ in range(1 + 12 // length):
            node.arrive(length)
        node.step()
        node.end_transfer()
    assert long not in node.referee.unfinished
    node.finish()
    assert node.referee.most_overtaken <= overtake


def test_a_long_prompt_that_waits_holds_no_blocks() -> None:
    """Short ones get theirs at once; first come, first served, the long prompts would have taken them all."""
    node = Node(Role.PREFILL, 40, prefill_overtake_tokens=10_000)
    node.arrive(40)
    node.arrive(80)
    node.arrive(80)
    for _ in range(3):
        node.arrive(8)
    assert node.harness.num_used < 20
    for _ in range(4):
        node.step()
    assert set(node.referee.unfinished) == {"r0", "r1", "r2"}
    node.finish()
