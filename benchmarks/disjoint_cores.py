"""Interference of P and D on disjoint cores: step times of both, alone and concurrently.

Two processes with a real engine each, on one random checkpoint. One computes a prompt repeatedly, the other decodes:
first on disjoint cores with one thread each, like ``threads`` and ``cpus`` of a 1P1D cluster, then both on all cores
with as many threads. P alone, D alone and both alternate; the results are medians of wall time per step. On disjoint
cores they share only the memory.

Usage: python benchmarks/disjoint_cores.py [--rounds 5] [--seconds 3] [--quantization none|w8a8|w8a16]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from support.bare_engine import BLOCK_SIZE, BareEngine, Batch, bare_engine

from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.node.plans import Chunk
from kvrelay.protocol.ids import BlockId

PRESET = "qwen2-0.5b"
CONTEXT = 512
WORK = {"P": (1, CONTEXT), "D": (8, 1)}
"""Sequences of a step, and how many tokens each computes."""


class Share(NamedTuple):
    """The cores of a process, and its threads."""

    cpus: list[int]
    threads: int


def batch(engine: BareEngine, num_seqs: int, num_tokens: int) -> Batch:
    rng, size, made = random.Random(1), CONTEXT // BLOCK_SIZE, []
    for index in range(num_seqs):
        tokens = [rng.randrange(3, engine.engine.vocab_size) for _ in range(CONTEXT)]
        sequence = engine.sequence(tokens, list(map(BlockId, range(index * size, (index + 1) * size))))
        sequence.num_computed_tokens = CONTEXT - num_tokens
        made.append((sequence, Chunk(CONTEXT - num_tokens, num_tokens, True)))
    return made


def work(model: Path, who: str, share: Share, overrides: Sequence[str], orders: Connection) -> None:
    """Compute steps for as many seconds as it is told, and tell how long each took, until it is told 0."""
    os.sched_setaffinity(0, share.cpus)
    num_seqs, num_tokens = WORK[who]
    num_blocks = num_seqs * CONTEXT // BLOCK_SIZE
    with bare_engine(model, num_blocks, CONTEXT, share.threads, overrides) as engine:
        step = batch(engine, num_seqs, num_tokens)
        engine.run(step)
        orders.send([])
        while seconds := orders.recv():
            took, end = [], time.perf_counter() + seconds
            while (began := time.perf_counter()) < end:
                engine.run(step)
                took.append(time.perf_counter() - began)
            orders.send(took)


@contextmanager
def workers(model: Path, shares: dict[str, Share], overrides: Sequence[str]) -> Iterator[dict[str, Connection]]:
    context, connections = multiprocessing.get_context("spawn"), {}
    processes = []
    for who, share in shares.items():
        connections[who], end = context.Pipe()
        processes.append(context.Process(target=work, args=(model, who, share, overrides, end)))
        processes[-1].start()
        end.close()
    try:
        for connection in connections.values():
            connection.recv()
        yield connections
        for connection in connections.values():
            connection.send(0)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
            process.join()


def measure(connections: dict[str, Connection], rounds: int, seconds: float) -> dict[tuple[str, str], float]:
    """Return the median seconds of a step by (whose, alone or both)."""
    took: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for together in (["P"], ["D"], ["P", "D"]):
            for who in together:
                connections[who].send(seconds)
            for who in together:
                took[who, "alone" if len(together) == 1 else "both"] += connections[who].recv()
    return {key: statistics.median(values) for key, values in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--quantization", choices=["none", "w8a8", "w8a16"], default="none")
    arguments = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        sys.exit("this needs two cores")
    first, last, all_of_them = Share(cpus[:1], 1), Share(cpus[-1:], 1), Share(cpus, len(cpus))
    cases = {
        "a core each": {"P": first, "D": last},
        f"all {len(cpus)} cores for both": {"P": all_of_them, "D": all_of_them},
    }
    heads = ("cores", "whose step", "alone, ms", "both at once, ms", "ratio")
    table = Table(*heads, title=f"{PRESET}: P computes {CONTEXT} tokens, D decodes {WORK['D'][0]} of {CONTEXT}")
    with tempfile.TemporaryDirectory(prefix="kvb-") as name:
        model = Path(name) / "model"
        write_tiny_checkpoint(model, "qwen2", preset=PRESET)
        for case, shares in cases.items():
            with workers(model, shares, [f"engine.quantization={arguments.quantization}"]) as connections:
                medians = measure(connections, arguments.rounds, arguments.seconds)
            for who in WORK:
                alone, both = medians[who, "alone"], medians[who, "both"]
                table.add_row(case, who, f"{1e3 * alone:.1f}", f"{1e3 * both:.1f}", f"{both / alone:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
