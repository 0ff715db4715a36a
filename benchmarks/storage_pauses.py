"""Delay of a node's steps by many preemptions: from the end of one step to the start of the next.

State machine, shell, staging memory and store of a mixed node in one process, with an engine that only sleeps. Its pool
is much too small for its requests, so it preempts continuously, and the KV of every victim is written to the store and
reloaded. The same load runs without a store, where KV is recomputed. The difference is the cost of the store. CPU time
is that of the loop's thread between two steps; wall time includes other load of the machine.

Usage: python benchmarks/storage_pauses.py [--steps 1500] [--backends file redis]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import uvloop
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from decode_node.machine import DecodeMachine
from kvrelay.config.cluster_config import CacheConfig, EngineConfig, NodeConfig, Role, SchedulerConfig, StorageConfig
from kvrelay.engine.compute_thread import ComputeThread
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import Exit, Received, RunStep, StepDone
from kvrelay.node.storage import StorageIO
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import ROUTER, NodeId, RequestId, SequenceId
from kvrelay.protocol.messages.engine import SampledTokens, SequenceOutcome, StepPlan, StepResult
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.messages.router_to_node import Generate
from kvrelay.protocol.request import RequestSpec, SamplingParams
from kvrelay.runtime.gc_tuning import tune_gc
from kvrelay.runtime.shell import Shell
from kvstore.offload.kv_offloader import num_staging_slots
from kvstore.storage.factory import make_store

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.redis_server import redis_server

BLOCK_SIZE, NUM_BLOCKS, NUM_REQUESTS = 16, 200, 24
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 4096
STEP_S = 0.01
GEOMETRY = KVGeometry(24, 2, 64, BLOCK_SIZE, "float32", "benchmark")
"""The KV of a model of 0.4 B parameters: 393 KB a block."""


class SleepingEngine:
    """Samples the same token for ever."""

    max_plans_in_flight = 1

    def run(self, plan: StepPlan, on_layers: Callable[[range], None]) -> StepResult:
        time.sleep(STEP_S)
        outcomes: dict[SequenceId, SequenceOutcome] = {
            item.id: SampledTokens([7] if item.samples else [], []) for item in plan.batch
        }
        return StepResult(step=plan.step, outcomes=outcomes)


class Sink:
    """Takes what the machine sends."""

    def send(self, peer: str, message: object) -> None: ...
    def connect(self, peer: str, address: str) -> None: ...
    def disconnect(self, peer: str) -> None: ...


class Turns:
    """Times between the end of a step and the start of the next, as the compute thread and the loop see them."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps
        self.clock_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self._ended_s = 0.0
        self._cpu_s = 0.0

    def post(self, shell: Shell) -> Callable[[object], None]:
        loop_clock = time.pthread_getcpuclockid(threading.get_ident())

        def post(event: object) -> None:
            if isinstance(event, StepDone):
                self._ended_s, self._cpu_s = time.perf_counter(), time.clock_gettime(loop_clock)
            shell.post_threadsafe(event)

        return post

    def started(self) -> None:
        """On the loop, when the machine wants a step."""
        now, cpu = time.perf_counter(), time.thread_time()
        if self._ended_s:
            self.clock_ms.append(1e3 * (now - self._ended_s))
            self.cpu_ms.append(1e3 * (cpu - self._cpu_s))
        self.left -= 1


async def storm(storage: StorageConfig, num_steps: int) -> tuple[Turns, dict[str, float]]:
    """Let a node preempt for ``num_steps`` steps."""
    node = NodeConfig(
        name="m0",
        role=Role.MIXED,
        port=1,
        cache=CacheConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(reserve_policy="none", watermark=0.0, max_num_seqs=NUM_REQUESTS),
        engine=EngineConfig(kind="fake"),
        storage=storage,
    )
    registration = Register(
        node_id=NodeId("m0"), incarnation="1", role=node.role, address=node.address, pid=1, model="m",
        max_model_len=32768, max_num_seqs=NUM_REQUESTS, num_blocks=NUM_BLOCKS, geometry=GEOMETRY,
    )  # fmt: skip
    memory, turns, machine = KVMemory.create(GEOMETRY, NUM_BLOCKS), Turns(num_steps), DecodeMachine(node, registration)
    shell = Shell(machine, clock=Clock())
    compute = ComputeThread(SleepingEngine(), turns.post(shell), layer_events=False)

    def run_step(action: RunStep) -> None:
        turns.started()
        if turns.left > 0:
            compute.submit(action.plan)
        else:
            shell._exit(Exit("enough"))

    shell.handle_with(RunStep, run_step)
    compute.start()
    tune_gc()
    store = make_store(storage, GEOMETRY, Clock())
    slots = num_staging_slots(storage, GEOMETRY.block_bytes)
    async with StorageIO(store, memory, slots, shell.post, Clock()) as performer:
        performer.handle_with(shell)
        for number in range(NUM_REQUESTS):
            prompt = [number * PROMPT_TOKENS + place for place in range(PROMPT_TOKENS)]
            sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, seed=0, ignore_eos=True)
            spec = RequestSpec(request_id=RequestId(f"r{number}"), epoch=1, prompt_token_ids=prompt, sampling=sampling)
            shell.post(Received(ROUTER, Generate(request=spec)))
        await shell.run(Sink())  # type: ignore[arg-type]
    compute.stop()
    counters = machine.load().counters
    memory.close()
    return turns, counters


def row(name: str, turns: Turns, counters: dict[str, float]) -> list[str]:
    def told(values: list[float]) -> list[str]:
        cut = statistics.quantiles(values, n=1000)
        return [f"{statistics.median(values):.2f}", f"{cut[989]:.2f}", f"{max(values):.2f}"]

    moved = [counters["preemptions"], counters["kv_blocks_saved"], counters["kv_blocks_loaded"]]
    return [name, *(f"{count:.0f}" for count in moved), *told(turns.cpu_ms), *told(turns.clock_ms)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--backends", nargs="+", choices=["file", "redis"], default=["file", "redis"])
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.steps} steps of {1e3 * STEP_S:.0f} ms; between two of them, ms")
    for heading in ("store", "preemptions", "saved", "loaded", "cpu p50", "p99", "max", "clock p50", "p99", "max"):
        table.add_column(heading, justify="right")

    def measure(name: Literal["none", "file", "redis"], **storage: Any) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            turns, counters = runner.run(
                storm(StorageConfig(backend=name, resume="storage", **storage), arguments.steps)
            )
        table.add_row(*row(name, turns, counters))

    measure("none")
    if "file" in arguments.backends:
        with tempfile.TemporaryDirectory(prefix="kvb-") as path:
            measure("file", path=path, capacity=2 << 30)
    if "redis" in arguments.backends:
        with redis_server() as server:
            measure("redis", url=SecretStr(server.url))
    measure("none")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
