"""Benefit of a store: reloading the KV of a preempted request, compared with recomputing it, on the real engine.

For each context length, the blocks are written through the staging memory as after a preemption. Then they are read
into other blocks of the pool and the newest token is computed (resume), or all tokens are computed in chunks of the
token budget (recompute). The program checks that both give the same next token. Two engines of one machine alternate in
one run.

Usage: python benchmarks/storage_resume.py [--preset qwen2-0.5b] [--tokens 256 512 1024 2048 4096] [--set a.b=c ...]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypeVar

import uvloop
import yaml
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from kvrelay.config.cluster_config import ClusterConfig, NodeConfig, StorageConfig
from kvrelay.engine.interface import Engine
from kvrelay.engine.load import load_engine
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, LoadKV, StageKV, StoreKV
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.node.storage import StorageIO
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.ids import BlockId, RequestId
from kvrelay.protocol.request import RequestSpec, SamplingParams, Sequence
from kvstore.offload.kv_offloader import num_staging_slots
from kvstore.storage.factory import make_store

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.redis_server import redis_server

BLOCK_SIZE, TOKEN_BUDGET, ROUNDS = 16, 2048, 3

E = TypeVar("E", KVStaged, KVStored, KVLoaded)


class Bench:
    """An engine whose pool has room for one context twice."""

    def __init__(self, node: NodeConfig) -> None:
        self.node = node
        self.engine: Engine = load_engine(node, lambda done, total: None)
        self.half = node.cache.fixed_num_blocks // 2
        self._plans = PlanWriter()
        self._step = 0

    def compute(self, sequence: Sequence, start: int) -> int:
        """Compute all tokens from ``start`` on; return the token sampled after them."""
        token = -1
        while start < sequence.num_tokens:
            count = min(TOKEN_BUDGET, sequence.num_tokens - start)
            samples = start + count == sequence.num_tokens
            self._step += 1
            plan = self._plans.write(self._step, [sequence], [Chunk(start, count, samples)])
            result = self.engine.run(plan, lambda layers: None)
            start += count
            sequence.num_computed_tokens = start
            if samples:
                token = result.sampled[0].token_ids[0]
        self._plans.leave(sequence)
        return token

    def sequence(self, num_tokens: int, first_block: int) -> Sequence:
        rng = random.Random(num_tokens)
        tokens = [rng.randrange(3, self.engine.vocab_size) for _ in range(num_tokens)]
        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        sequence = Sequence(RequestSpec(request_id=RequestId("r"), epoch=1, prompt_token_ids=tokens, sampling=sampling))
        sequence.take_blocks(list(map(BlockId, range(first_block, first_block + -(-num_tokens // BLOCK_SIZE)))))
        return sequence


async def one_store(
    bench: Bench, storage: StorageConfig, lengths: list[int], computed: dict[int, float]
) -> list[list[str]]:
    """Return a row for each length; ``computed`` gets the recompute's seconds, measured in turns with the loads."""
    events: asyncio.Queue[object] = asyncio.Queue()
    geometry = bench.engine.geometry
    slots = num_staging_slots(storage, geometry.block_bytes)
    rows = []
    store = make_store(storage, geometry, Clock())
    async with StorageIO(store, bench.engine.memory, slots, events.put_nowait, Clock()) as io:

        async def done(action: StageKV | StoreKV | LoadKV, kind: type[E]) -> E:
            io.perform(action)
            while not isinstance(event := await events.get(), kind):
                pass
            return event

        for length in lengths:
            hashes = BlockHasher(geometry.model_digest, BLOCK_SIZE).hashes(bench.sequence(length, 0).token_ids)
            best = {"recompute": float("inf"), "stage": float("inf"), "write": float("inf"), "resume": float("inf")}
            for _ in range(ROUNDS):
                await store.clear()
                source, target = bench.sequence(length, 0), bench.sequence(length, bench.half)
                began = time.perf_counter()
                expected = bench.compute(source, 0)
                best["recompute"] = min(best["recompute"], time.perf_counter() - began)
                kept = hashes[: (length - 1) // BLOCK_SIZE]
                began = time.perf_counter()
                await done(StageKV(1, source.block_table[: len(kept)], range(len(kept))), KVStaged)
                staged = time.perf_counter()
                stored = await done(StoreKV(1, kept, range(len(kept))), KVStored)
                written = time.perf_counter()
                assert stored.num_blocks == len(kept), stored
                load = LoadKV(1, kept, target.block_table[: len(kept)], 1, storage.timeout_s)
                loaded = await done(load, KVLoaded)
                assert loaded.num_blocks == len(kept), loaded
                target.num_computed_tokens = len(kept) * BLOCK_SIZE
                assert bench.compute(target, target.num_computed_tokens) == expected
                best["resume"] = min(best["resume"], time.perf_counter() - written)
                best["stage"], best["write"] = min(best["stage"], staged - began), min(best["write"], written - staged)
            computed[length] = min(computed.get(length, float("inf")), best["recompute"])
            megabytes = len(kept) * geometry.block_bytes / 1e6
            times = [f"{1e3 * best[name]:.1f}" for name in ("stage", "write", "resume", "recompute")]
            ratio = best["resume"] / best["recompute"]
            rows.append([storage.backend, str(length), f"{megabytes:.0f}", *times, f"{ratio:.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="qwen2-0.5b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.preset}: ms, best of {ROUNDS}")
    for heading in ("store", "tokens", "MB", "stage", "write", "resume", "recompute", "resume / recompute"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory(prefix="kvb-") as name, redis_server() as server:
        directory = Path(name)
        write_tiny_checkpoint(directory / "model", "qwen2", preset=arguments.preset)
        config = {
            "model": {"path": str(directory / "model"), "max_model_len": max(arguments.tokens) + BLOCK_SIZE},
            "cache": {"block_size": BLOCK_SIZE, "num_blocks": 2 * (max(arguments.tokens) // BLOCK_SIZE + 1)},
            "scheduler": {"max_num_batched_tokens": TOKEN_BUDGET},
            "nodes": [{"name": "m0", "role": "mixed", "port": 8200, "threads": 1}],
        }
        (directory / "cluster.yaml").write_text(yaml.safe_dump(config))
        node = ClusterConfig.load(directory / "cluster.yaml", arguments.overrides).node("m0")
        bench, computed = Bench(node), dict[int, float]()
        room: dict[str, Any] = {"staging": 1 << 30, "timeout_s": 60.0}
        stores = [
            StorageConfig(backend="file", path=str(directory / "kv"), capacity=2 << 30, **room),
            StorageConfig(backend="redis", url=SecretStr(server.url), **room),
        ]
        try:
            for storage in stores:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    for row in runner.run(one_store(bench, storage, arguments.tokens, computed)):
                        table.add_row(*row)
        finally:
            bench.engine.close()
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
