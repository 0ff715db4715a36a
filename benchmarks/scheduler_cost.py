"""Cost of scheduling: microseconds per running request and step, without a model.

    python benchmarks/scheduler_cost.py

Times are CPU times of the thread, so that other processes matter less.

The real state machines get made-up step results. "A step" is all work between two model steps: taking the result,
appending tokens, finishing requests, freeing and growing block tables, deciding and building the next batch. Encoding
the step's message to the router is measured separately. The baseline in the same run is a bare loop that appends a
token to a list per request and builds a tuple: the minimum cost of touching a request in Python.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from decode_node.machine import DecodeMachine
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.machine.contract import Machine, Received, RunStep, Send, StepDone
from kvrelay.node.recording import NODE_EVENTS
from kvrelay.protocol.codec import encode
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import MESSAGER, ROUTER, NodeId, PeerId, RequestId, SequenceId
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.engine import SampledTokens, SequenceOutcome, StepPlan, StepResult
from kvrelay.protocol.messages.messager_to_node import MessagerReady
from kvrelay.protocol.messages.node_to_router import Register, RequestOutput, TokensOut
from kvrelay.protocol.messages.router_to_node import Generate, Prefill
from kvrelay.protocol.request import RequestSpec, SamplingParams
from kvrelay.recording.recorder import Handle
from kvrelay.runtime.dumps import Dumps
from kvrelay.runtime.gc_tuning import tune_gc
from prefill_node.machine import PrefillMachine
from router.events import Deliver, TokensDelivered
from router.recording import ROUTER_EVENTS

PROMPT_TOKENS = 500
STEPS = 200
ROUNDS = 5
RECORD_ROUNDS = 24
BLOCK_SIZE = 16

GEOMETRY = KVGeometry(1, 1, 8, BLOCK_SIZE, "uint8", "benchmark")
LINK = LinkAddress(peer=PeerId("m"), host_id="h", tcp="tcp://127.0.0.1:1", ipc="")


def node(role: str, num_seqs: int) -> NodeConfig:
    return NodeConfig.model_validate(
        {
            "name": "n0",
            "role": role,
            "port": 1,
            "cache": {"block_size": BLOCK_SIZE, "num_blocks": num_seqs * 64, "prefix_caching": True},
            "scheduler": {"max_num_seqs": num_seqs, "max_num_batched_tokens": 1 << 20},
        }
    )


def register(config: NodeConfig, geometry: KVGeometry = GEOMETRY) -> Register:
    return Register(
        node_id=NodeId(config.name),
        incarnation="0",
        role=config.role,
        address="",
        pid=0,
        model="m",
        max_model_len=1 << 20,
        max_num_seqs=config.scheduler.max_num_seqs,
        num_blocks=config.cache.fixed_num_blocks,
        geometry=geometry,
    )


def spec(index: int, prompt_tokens: int = PROMPT_TOKENS) -> RequestSpec:
    prompt = [(index * 7919 + position) % 50_000 for position in range(prompt_tokens)]
    sampling = SamplingParams(max_tokens=400, seed=index)
    return RequestSpec(request_id=RequestId(f"r{index}"), epoch=1, prompt_token_ids=prompt, sampling=sampling)


def result_of(plan: StepPlan) -> StepResult:
    outcomes: dict[SequenceId, SequenceOutcome] = {
        item.id: SampledTokens([7] if item.samples else [], []) for item in plan.batch
    }
    return StepResult(step=plan.step, outcomes=outcomes)


def plan_in(actions: Sequence[object]) -> StepPlan | None:
    return next((action.plan for action in actions if isinstance(action, RunStep)), None)


def running_decodes(num_running: int) -> tuple[Machine, StepPlan]:
    """Return a machine with that many decodes, and its plan for the next step of them."""
    machine = DecodeMachine(node("mixed", num_running), register(node("mixed", num_running)))
    plan = None
    for index in range(num_running):
        plan = plan_in(machine.handle(Received(ROUTER, Generate(request=spec(index))), 0.0)) or plan
    while plan is None or len(plan.batch) < num_running or plan.num_tokens > num_running:
        plan = step(machine, plan)
    return machine, plan


def decode_cost_us(num_running: int) -> tuple[float, float]:
    """Return microseconds per running decode and step: of the machine, and of encoding its message."""
    machine, next_plan = running_decodes(num_running)
    plan: StepPlan | None = next_plan
    spent_s = encoded_s = 0.0
    for _ in range(STEPS):
        assert plan is not None
        done = StepDone(result_of(plan))
        start = time.thread_time()
        actions = machine.handle(done, 0.0)
        spent_s += time.thread_time() - start
        plan = plan_in(actions)
        message = next(a.message for a in actions if isinstance(a, Send) and isinstance(a.message, TokensOut))
        start = time.thread_time()
        encode(message)
        encoded_s += time.thread_time() - start
    return (spent_s / STEPS / num_running * 1e6, encoded_s / STEPS / num_running * 1e6)


def record_cost_us(num_running: int, *, cold: bool = False) -> tuple[float, float]:
    """Return microseconds per step of the machine, and how much more they are if its events are recorded.

    Of each step the least of some rounds counts, with a record and without: a record is less than the noise of a step.
    ``cold``: 6 MiB are copied before each step, as a model uses the CPU's caches for itself.
    """
    dumps = Dumps("n0", "mixed", {}, NODE_EVENTS)
    least_s = [[math.inf] * STEPS, [math.inf] * STEPS]
    others = bytearray(6 << 20 if cold else 0)
    for number in range(RECORD_ROUNDS):
        machine, plan = running_decodes(num_running)
        handles = (machine.handle, dumps.recorded(machine.handle))
        for index in range(STEPS):
            done = StepDone(result_of(plan))
            bytes(others)
            way = (number + index + index // 2) % 2
            start = time.thread_time()
            actions = handles[way](done, 0.0)
            least_s[way][index] = min(least_s[way][index], time.thread_time() - start)
            following = plan_in(actions)
            assert following is not None
            plan = following
    machine_s, recorded_s = map(statistics.mean, least_s)
    return machine_s * 1e6, (recorded_s - machine_s) * 1e6


def message_record_us(num_tokens: int) -> float:
    """Return microseconds that the record of a message of that many tokens costs a router, at best."""
    outputs = [
        RequestOutput(request_id=RequestId(f"cmpl-{index:032x}"), epoch=1, index=index, token_ids=[7000 + index])
        for index in range(num_tokens)
    ]
    message = TokensOut(outputs=outputs)
    event = Received(PeerId("d0#1"), message, (), encode(message))
    actions = [Deliver(output.request_id, TokensDelivered(output.token_ids)) for output in outputs]
    plain: Handle = lambda event, now: actions  # noqa: E731
    recorded = Dumps(ROUTER, ROUTER, {}, ROUTER_EVENTS).recorded(plain)

    def cost_us(handle: Handle) -> float:
        start = time.thread_time()
        for _ in range(1000):
            handle(event, 0.0)
        return (time.thread_time() - start) * 1e3

    return best(lambda: cost_us(recorded))[0] - best(lambda: cost_us(plain))[0]


def step(machine: Machine, plan: StepPlan | None) -> StepPlan:
    assert plan is not None
    following = plan_in(machine.handle(StepDone(result_of(plan)), 0.0))
    assert following is not None
    return following


def prefill_cost_us(num_queued: int) -> float:
    """Return microseconds per chunk of ``prefill_schedule``, results included, with ``num_queued`` prompts there."""
    config = node("prefill", num_queued).model_copy()
    scheduler = config.scheduler.model_copy(update={"max_num_batched_tokens": 2048})
    config = config.model_copy(update={"scheduler": scheduler})
    machine = PrefillMachine(config, register(config))
    machine.handle(Received(MESSAGER, MessagerReady(link=LINK)), 0.0)
    plan = None
    for index in range(num_queued):
        actions = machine.handle(Received(ROUTER, Prefill(request=spec(index), decode_node=None)), 0.0)
        plan = plan_in(actions) or plan
    spent_s, chunks = 0.0, 0
    while plan is not None:
        chunks += len(plan.batch)
        done = StepDone(result_of(plan))
        start = time.thread_time()
        actions = machine.handle(done, 0.0)
        spent_s += time.thread_time() - start
        plan = plan_in(actions)
    return spent_s / chunks * 1e6


def bare_loop_us(num_running: int) -> float:
    tokens: list[list[int]] = [[] for _ in range(num_running)]
    start = time.thread_time()
    for _ in range(STEPS):
        batch = []
        for ids in tokens:
            ids.append(7)
            batch.append((ids, len(ids), 1, True))
    return (time.thread_time() - start) / STEPS / num_running * 1e6


def best(measure: Callable[[], float]) -> tuple[float, float]:
    """Return the least and the median of several rounds."""
    values = [measure() for _ in range(ROUNDS)]
    return min(values), statistics.median(values)


def main() -> None:
    tune_gc()  # as every node does
    table = Table(title="us per running request and step")
    for column in (
        "running decodes",
        "machine, best",
        "machine, median",
        "encoding",
        "bare loop",
        "machine / bare loop",
    ):
        table.add_column(column, justify="right")
    for num_running in (1, 32, 64, 256, 1024):
        machine = best(lambda n=num_running: decode_cost_us(n)[0])  # type: ignore[misc]
        encoding = decode_cost_us(num_running)[1]
        bare = best(lambda n=num_running: bare_loop_us(n))[0]  # type: ignore[misc]
        cells = (*machine, encoding, bare, machine[0] / bare)
        table.add_row(str(num_running), *(f"{cell:.2f}" for cell in cells))
    console = Console()
    console.print(table)
    least, median = best(lambda: prefill_cost_us(256))
    for num_running in (1, 32):
        for cold in (False, True):
            machine_us, more_us = record_cost_us(num_running, cold=cold)
            console.print(
                f"a step of {num_running}, {'cold' if cold else 'warm'}: {machine_us:.2f} us, with a record"
                f" {more_us:.2f} more ({more_us / machine_us:.1%})"
            )
    console.print(f"record of a message with 32 tokens: {message_record_us(32):.2f} us")
    console.print(f"prefill_schedule, 256 prompts queued: {least:.1f} us a chunk (median {median:.1f})")


if __name__ == "__main__":
    main()
