"""Cost of a step outside the kernels (scheduling, batch, sampling, message) and inside them, by operation.

The state machine of a mixed node with the real engine on a random checkpoint, without processes and network; CPU time
of the thread. The prompts are computed before the measurement; then the requests decode together. Times of the kernels
are measured from entry to exit of each operation, so the cost of measuring counts as outside. The second table adds a
prompt to the decodes.

Usage: python benchmarks/step_overhead.py [--steps 40] [--batch-sizes 8 32] [--quantization none|w8a8|w8a16]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from scheduler_cost import plan_in, register, spec

from decode_node.machine import DecodeMachine
from kvrelay.config.cluster_config import ClusterConfig, NodeConfig
from kvrelay.engine import select_kernels
from kvrelay.engine.interface import Engine
from kvrelay.engine.load import load_engine
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.machine.contract import Received, Send, StepDone
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.protocol.codec import encode
from kvrelay.protocol.ids import ROUTER, BlockId
from kvrelay.protocol.messages.node_to_router import TokensOut
from kvrelay.protocol.messages.router_to_node import Generate
from kvrelay.protocol.request import RequestSpec, SamplingParams, Sequence
from kvrelay.runtime.gc_tuning import tune_gc

PRESET = "qwen2-0.5b"
PROMPT_TOKENS = 512
PROMPTS = 3
OPERATIONS = (
    "embed",
    "normalize",
    "linear",
    "add_linear",
    "apply_rope_and_write_kv",
    "attention",
    "silu_mul",
    "finite_rows",
    "logits",
)
PARTS = ("machine", "message", "batch and sampling", "kernels")
clock = time.thread_time


class Timed:
    """Adds up the time spent in each of the operations of kernels."""

    def __init__(self) -> None:
        self.by_operation = dict.fromkeys(OPERATIONS, 0.0)
        self._depth = 0

    @property
    def seconds(self) -> float:
        """The time of all operations."""
        return sum(self.by_operation.values())

    def wrapped(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``choose_kernels`` whose kernels are timed."""

        def chosen(*arguments: Any) -> Any:
            kernels = choose(*arguments)
            for name in OPERATIONS:
                setattr(kernels, name, self._timed(name, getattr(kernels, name)))
            return kernels

        return chosen

    def _timed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            if self._depth:  # one operation calls another
                return operation(*arguments)
            self._depth, began = 1, clock()
            try:
                return operation(*arguments)
            finally:
                self.by_operation[name] += clock() - began
                self._depth = 0

        return timed


def node(model: Path, batch_size: int, quantization: str) -> NodeConfig:
    data = {
        "model": {"path": str(model)},
        "engine": {"quantization": quantization},
        "cache": {"num_blocks": batch_size * 64},
        "scheduler": {"max_num_seqs": batch_size, "max_num_batched_tokens": 1 << 20},
        "nodes": [{"name": "n0", "role": "mixed", "port": 8200}],
    }
    return ClusterConfig.from_data(data).node("n0")


def greedy(index: int) -> RequestSpec:
    made = spec(index, PROMPT_TOKENS)
    tokens = [token % 8000 for token in made.prompt_token_ids]
    sampling = SamplingParams(max_tokens=400, seed=index, temperature=0.0)
    return msgspec.structs.replace(made, prompt_token_ids=tokens, sampling=sampling)


def measure(
    engine: Engine, config: NodeConfig, batch_size: int, steps: int, timed: Timed
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return the seconds of each part of each step, and those of each operation of all of them."""
    machine = DecodeMachine(config, register(config, engine.geometry))
    plan = None
    for index in range(batch_size):
        plan = plan_in(machine.handle(Received(ROUTER, Generate(request=greedy(index))), 0.0)) or plan
    while plan is not None and (len(plan.batch) < batch_size or plan.num_tokens > batch_size):
        plan = plan_in(machine.handle(StepDone(engine.run(plan, lambda layers: None)), 0.0))
    before = dict(timed.by_operation)
    spent = []
    for _ in range(steps):
        assert plan is not None
        in_kernels, began = timed.seconds, clock()
        result = engine.run(plan, lambda layers: None)
        computed = clock()
        actions = machine.handle(StepDone(result), 0.0)
        scheduled = clock()
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, TokensOut):
                encode(action.message)
        sent = clock()
        kernels_s = timed.seconds - in_kernels
        parts = (scheduled - computed, sent - scheduled, computed - began - kernels_s, kernels_s)
        spent.append(dict(zip(PARTS, parts, strict=True)))
        plan = plan_in(actions)
    return spent, since(before, timed)


def measure_prompt(engine: Engine, timed: Timed) -> dict[str, float]:
    """Return the seconds of each operation of a prompt, the best of some in all."""
    sequence = Sequence(greedy(0))
    sequence.take_blocks(list(map(BlockId, range(PROMPT_TOKENS // engine.geometry.block_size))))
    plans = PlanWriter()
    found = []
    for _ in range(PROMPTS):
        plan = plans.write(0, [sequence], [Chunk(0, PROMPT_TOKENS, True)])
        plans.leave(sequence)
        before = dict(timed.by_operation)
        engine.run(plan, lambda layers: None)
        found.append(since(before, timed))
    return min(found, key=lambda spent: sum(spent.values()))


def since(before: dict[str, float], timed: Timed) -> dict[str, float]:
    return {name: seconds - before[name] for name, seconds in timed.by_operation.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--quantization", choices=["none", "w8a8", "w8a16"], default="none")
    arguments = parser.parse_args()
    tune_gc()  # as every node does
    timed = Timed()
    select_kernels.choose_kernels = timed.wrapped(select_kernels.choose_kernels)
    table = Table("decodes", *(f"{part}, ms" for part in PARTS), "outside kernels", "aim")
    operations = Table("step", *(f"{name}, ms" for name in OPERATIONS))

    def add(step: str, seconds: dict[str, float], count: int) -> None:
        operations.add_row(step, *(f"{1e3 * seconds[name] / count:.2f}" for name in OPERATIONS))

    with tempfile.TemporaryDirectory(prefix="kvb-") as name:
        model = Path(name) / "model"
        write_tiny_checkpoint(model, "qwen2", preset=PRESET)
        for batch_size in arguments.batch_sizes:
            config = node(model, batch_size, arguments.quantization)
            engine = load_engine(config, lambda done, total: None)
            spent, by_operation = measure(engine, config, batch_size, arguments.steps, timed)
            add(f"{batch_size} decodes", by_operation, arguments.steps)
            if batch_size == arguments.batch_sizes[-1]:
                add(f"a prompt of {PROMPT_TOKENS}", measure_prompt(engine, timed), 1)
            engine.close()
            medians = [1e3 * statistics.median(step[part] for step in spent) for part in PARTS]
            share = 1 - medians[-1] / sum(medians)
            table.add_row(str(batch_size), *(f"{ms:.3f}" for ms in medians), f"{share:.1%}", "5 %")
    console = Console(width=140)
    console.print(table)
    console.print(operations)


if __name__ == "__main__":
    main()
