"""Step time: decodes by batch size and context, prefill by chunk size, with the limits.

The real engine with the kernels that its config selects, on a random checkpoint, without a node. Limits are measured
in the same run: weights and KV over read bandwidth, FLOP over oneDNN's maximum. With one thread CPU time is used, else
wall time. Rounds go over all steps, and the best of all rounds counts. The blocks of a sequence are scattered in the
pool, as after some time of serving.

Usage: python benchmarks/scaling.py [--threads 1] [--quantization none|w8a8|w8a16] [--set a.b=c ...] [--plot FILE]

With int8 weights the read limit is that of half the bytes; the compute limit is still oneDNN's in bfloat16.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from support.bare_engine import BLOCK_SIZE, BareEngine, Batch, bare_engine
from support.limits import QWEN2, Limits, ModelCost, measure_limits

from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.node.plans import Chunk
from kvrelay.protocol.ids import BlockId

PRESET = "qwen2-0.5b"
BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
CHUNKS = (64, 128, 256, 512, 1024, 2048)
FIXED_CONTEXT, FIXED_BATCH_SIZE = 512, 8
AXES = {"batch_size": "sequences", "context": "tokens of context each", "num_tokens": "tokens of the prompt"}
NUM_BLOCKS = max(max(BATCH_SIZES) * FIXED_CONTEXT, FIXED_BATCH_SIZE * max(CONTEXTS)) // BLOCK_SIZE


@dataclass
class Step:
    """A step of so many sequences that each compute the last ``num_tokens`` of ``context``; seconds of each round."""

    batch_size: int
    context: int
    num_tokens: int
    cost: ModelCost
    seconds: list[float] = field(default_factory=list)

    @property
    def best_s(self) -> float:
        return min(self.seconds)

    def read_s(self, limits: Limits) -> float:
        return self.cost.decode_gb(self.batch_size, self.context) / limits.gb_s

    def compute_s(self, limits: Limits) -> float:
        if self.num_tokens > 1:
            return self.cost.prefill_s(self.num_tokens, limits)
        return self.cost.decode_gflop(self.batch_size, self.context) / limits.gflops


def scheduled(engine: BareEngine, step: Step, rng: random.Random) -> Batch:
    """Return the batch of ``step``, on blocks anywhere; what lies in them is as good as any other KV."""
    blocks = rng.sample(range(NUM_BLOCKS), step.batch_size * -(-step.context // BLOCK_SIZE))
    size = len(blocks) // step.batch_size
    batch = []
    for index in range(step.batch_size):
        tokens = [rng.randrange(3, engine.engine.vocab_size) for _ in range(step.context)]
        sequence = engine.sequence(tokens, list(map(BlockId, blocks[index * size : (index + 1) * size])))
        sequence.num_computed_tokens = step.context - step.num_tokens
        batch.append((sequence, Chunk(sequence.num_computed_tokens, step.num_tokens, True)))
    return batch


def measure(engine: BareEngine, steps: Seq[Step], rounds: int, threads: int) -> None:
    clock = time.thread_time if threads == 1 else time.perf_counter
    memory = engine.engine.memory
    assert isinstance(memory, KVMemory)
    values = np.random.default_rng(0).integers(0x3C00, 0x3F80, memory.size_bytes // 2, dtype=np.uint16)
    memory.planes.reshape(-1)[:] = values.view(np.uint8)  # small numbers, in every type
    rng = random.Random(0)
    batches = [scheduled(engine, step, rng) for step in steps]
    for batch in batches:
        engine.run(batch)
    for _ in range(rounds):
        for step, batch in zip(steps, batches, strict=True):
            began = clock()
            engine.run(batch)
            step.seconds.append(clock() - began)


def table(title: str, steps: Seq[Step], limits: Limits) -> Table:
    made = Table(title=title)
    for heading in (
        "sequences",
        "context",
        "tokens each",
        "ms",
        "reading, ms",
        "computing, ms",
        "of the limit",
        "tokens/s",
    ):
        made.add_column(heading, justify="right")
    for step in steps:
        bounds = [step.read_s(limits), step.compute_s(limits)]
        times = (f"{1e3 * second:.1f}" for second in (step.best_s, *bounds))
        per_s = step.batch_size * step.num_tokens / step.best_s
        sizes = (str(step.batch_size), str(step.context), str(step.num_tokens))
        made.add_row(*sizes, *times, f"{max(bounds) / step.best_s:.2f}", f"{per_s:.0f}")
    return made


def plot(panels: Seq[tuple[str, str, Seq[Step]]], limits: Limits, path: Path) -> None:
    """Draw each (title, what varies, steps) with both limits. Needs the extra ``bench``."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none"})
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(3.5 * len(panels), 3.3))
    for axes, (title, varies, steps) in zip(all_axes, panels, strict=True):
        at = [getattr(step, varies) for step in steps]
        axes.plot(at, [1e3 * step.best_s for step in steps], "o-", color="#2a7f62", markersize=4, label="measured")
        axes.plot(
            at, [1e3 * step.read_s(limits) for step in steps], "--", color="#1f5fa8", label="reading weights and KV"
        )
        axes.plot(at, [1e3 * step.compute_s(limits) for step in steps], ":", color="#c8553d", label="computing")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(AXES[varies])
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    all_axes[0].set_ylabel("step time, ms")
    all_axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantization", choices=["none", "w8a8", "w8a16"], default="none")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a key of the node's config")
    parser.add_argument("--plot", type=Path, help="draw the steps there (.svg or .png)")
    arguments = parser.parse_args()
    settings = [*arguments.overrides, f"engine.quantization={arguments.quantization}"]
    cost = QWEN2 if arguments.quantization == "none" else replace(QWEN2, item_bytes=1.0)
    by_batch_size = [Step(size, FIXED_CONTEXT, 1, cost) for size in BATCH_SIZES]
    by_context = [Step(FIXED_BATCH_SIZE, context, 1, cost) for context in CONTEXTS]
    by_chunk = [Step(1, chunk, chunk, cost) for chunk in CHUNKS]
    limits = measure_limits(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="kvb-") as name:
        model = Path(name) / "model"
        write_tiny_checkpoint(model, "qwen2", preset=PRESET)
        with bare_engine(model, NUM_BLOCKS, max(CONTEXTS), arguments.threads, settings) as engine:
            measure(engine, [*by_batch_size, *by_context, *by_chunk], arguments.rounds, arguments.threads)
    panels = (
        (f"decodes, {FIXED_CONTEXT} tokens of context each", "batch_size", by_batch_size),
        (f"{FIXED_BATCH_SIZE} decodes", "context", by_context),
        ("prefill of one prompt, in one chunk", "num_tokens", by_chunk),
    )
    console = Console(width=110)
    console.print(
        f"{PRESET}, {arguments.threads} threads, {' '.join(settings)}, best of {arguments.rounds}; "
        f"oneDNN's best {limits.gflops:.0f} GFLOP/s in {limits.dtype}, reads {limits.gb_s:.1f} GB/s"
    )
    for title, _, steps in panels:
        console.print(table(title, steps, limits))
    if arguments.plot:
        plot(panels, limits, arguments.plot)


if __name__ == "__main__":
    main()
