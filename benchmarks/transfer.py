"""Cost of KV transfer: messagers against memcpy and bare ZMQ, and the overlap of transfer and prefill.

Links: real messagers between two pools; this process acts as their nodes. The time is from OpenTransfer, with all
blocks signalled before, to the last KVArrived. memcpy is numpy's copy of the same blocks from pool to pool. Bare ZMQ is
two processes that send views of one pool and copy received data to the other, in messages of the size of the
messagers' frames. All alternate within each round. ``best`` is the ratio of the fastest rounds, ``median`` the median
of the ratios within rounds. CPU time is the minimum of all rounds. Baselines always have contiguous blocks. The link
nixl is measured if its library is installed: on one host it uses shared memory, so it is compared without an aim.

Links of simulated devices: both pools are host memory with the code of a device's pool. Copies and digests that a GPU
makes by itself cost the host here, so this is no GPU's speed (docs/gpu.md has that). On the busy device each copy ends
1.4 ms later than it would: what a third process waited in the median for its turn on an H200 while another computed.

Overlap: a 1P1D cluster, once layerwise and once not. Prompts with two output tokens alternate with prompts with one,
which need no decode node and no transfer. Hidden is the share of the transfer time (by P's timeline, all layers
together) before P's first token.

Usage: python benchmarks/transfer.py [links overlap] [--rounds 9] [--prompts 2] [--tokens 512 1024 2048]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table
from support.bare_zmq import BareZmq, Chunk, bare_zmq
from support.cpu_time import cpu_s
from support.overlap import Prompts, measure_overlap

from cache_messager.links.interface import HOST_FRAME_BYTES
from cache_messager.links.nixl.agent import reason_against
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.kv_pool.simulated_blocks import SimulatedBlocks
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId, RequestId
from kvrelay.protocol.messages.messager_to_node import KVArrived, KVExpected, TransferDone
from kvrelay.protocol.messages.node_to_messager import CachedSignal, ExpectKV, KVSpan, OpenTransfer

sys.path.append(str(Path(__file__).parents[1] / "tests" / "unit" / "cache_messager"))
from messager_node import MessagerNode, messager_node
from pools import Pool, make_pool, wrote

BLOCK_SIZE = 16
AIMS = {"shm": 0.7, "ipc": 0.85, "tcp": 0.85}
HIDDEN_AIM, COST_AIM = 0.9, 0.03

SMALL = KVGeometry(24, 2, 64, BLOCK_SIZE, "bfloat16", "24 layers of 2 x 64")
LARGE = KVGeometry(32, 8, 128, BLOCK_SIZE, "bfloat16", "32 layers of 8 x 128")


Memory: TypeAlias = Literal["host", "device", "busy device"]
"""What a pool is in; devices are simulated."""


class Kind(NamedTuple):
    """A link as it is measured."""

    link: str
    checksum: bool = True
    memory: Memory = "host"

    @property
    def is_compared(self) -> bool:
        """Whether bare ZMQ or memcpy does the same work."""
        return self.memory == "host" or self.link != "cuda"


BUSY_S = 0.0014
"""How much later copies of the busy device end."""

KINDS = {
    "shm": Kind("shm"),
    "ipc": Kind("ipc"),
    "ipc, unchecked": Kind("ipc", checksum=False),
    "tcp": Kind("tcp"),
    "tcp, unchecked": Kind("tcp", checksum=False),
    "cuda, simulated": Kind("cuda", memory="device"),
    "ipc, simulated": Kind("ipc", memory="device"),
    "tcp, simulated": Kind("tcp", memory="device"),
    "cuda, simulated, busy": Kind("cuda", memory="busy device"),
    "tcp, simulated, busy": Kind("tcp", memory="busy device"),
    **({} if reason_against() else {"nixl": Kind("nixl")}),
}
BASES = {"shm": "memcpy", "ipc": "bare ipc", "tcp": "bare tcp", "nixl": "bare tcp"}


class Case(NamedTuple):
    """``num_prompts`` prompts at once, the blocks of each in one piece or, ``scattered``, anywhere."""

    geometry: KVGeometry
    num_prompts: int
    num_tokens: int
    scattered: bool = False

    @property
    def blocks_each(self) -> int:
        return self.geometry.blocks_for(self.num_tokens)

    @property
    def num_blocks(self) -> int:
        return self.num_prompts * self.blocks_each

    @property
    def size_bytes(self) -> int:
        return self.num_blocks * self.geometry.block_bytes

    def places(self, seed: int) -> list[list[BlockId]]:
        """Return each prompt's blocks, others for each ``seed``."""
        rng = np.random.default_rng(seed)
        if self.scattered:
            parts = np.split(rng.permutation(self.num_blocks), self.num_prompts)
            return [list(map(BlockId, part.tolist())) for part in parts]
        order = rng.permutation(self.num_prompts).tolist()
        return [list(map(BlockId, range(place * self.blocks_each, (place + 1) * self.blocks_each))) for place in order]

    def chunks(self) -> list[Chunk]:
        """Return the frames a messager sends for blocks in one piece."""
        in_one_piece = self._replace(scattered=False)
        places = list(zip(in_one_piece.places(1), in_one_piece.places(2), strict=True))
        most_blocks = HOST_FRAME_BYTES // self.geometry.layer_block_bytes
        num_layers, num_blocks = max(1, most_blocks // self.blocks_each), min(most_blocks, self.blocks_each)
        return [
            Chunk(layer, min(num_layers, self.geometry.num_layers - layer), source[first], target[first], num_blocks)
            for layer in range(0, self.geometry.num_layers, num_layers)
            for source, target in places
            for first in range(0, self.blocks_each, num_blocks)
        ]

    def __str__(self) -> str:
        size = (
            f"{self.geometry.model_digest}, {self.num_prompts} x {self.num_tokens} tokens, {self.size_bytes >> 20} MiB"
        )
        return size + (", scattered blocks" if self.scattered else "")


CASES = (
    Case(SMALL, 16, 512),
    Case(SMALL, 4, 2048),
    Case(SMALL, 4, 2048, scattered=True),
    Case(LARGE, 1, 1024),
    Case(LARGE, 1, 1024, scattered=True),
)


# ---------------------------------------------------------------- what moves the bytes


class Mover(Protocol):
    """One way to get a case's blocks from P's pool to D's; only ``move`` is timed."""

    @property
    def pids(self) -> list[int]:
        """The other processes that move the bytes: P's, D's."""

    async def prepare(self, case: Case) -> None:
        """Do what comes before the first byte may move."""

    async def move(self) -> None:
        """Return when everything is in D's pool."""

    async def finish(self) -> None:
        """Take the rest of the answers."""


class Memcpy:
    """numpy, in this process: what no link can beat."""

    def __init__(self, p_pool: KVMemory, d_pool: KVMemory) -> None:
        self.pids: list[int] = []
        self._p_pool, self._d_pool = p_pool, d_pool

    async def prepare(self, case: Case) -> None:
        self._pairs = [
            (self._d_pool.planes[layer, kv, target:][:count], self._p_pool.planes[layer, kv, source:][:count])
            for first, num_layers, source, target, count in case.chunks()
            for layer in range(first, first + num_layers)
            for kv in (0, 1)
        ]

    async def move(self) -> None:
        for target, source in self._pairs:
            np.copyto(target, source)

    async def finish(self) -> None:
        pass


class Bare:
    """ZMQ with nothing around it."""

    def __init__(self, processes: BareZmq) -> None:
        self._processes = processes
        self.pids = processes.pids

    async def prepare(self, case: Case) -> None:
        self._chunks = case.chunks()

    async def move(self) -> None:
        self._processes.move(self._chunks)

    async def finish(self) -> None:
        pass


class Messagers:
    """P's and D's messager, asked as nodes ask them."""

    def __init__(self, p: MessagerNode, d: MessagerNode, link: str) -> None:
        self._p, self._d, self._link = p, d, link
        self.pids = [p.process.pid, d.process.pid]
        self._num_moves = 0

    async def prepare(self, case: Case) -> None:
        self._num_moves += 1
        names = [f"{self._num_moves}.{number}" for number in range(case.num_prompts)]
        self._targets = dict(zip(names, case.places(2), strict=True))
        for (name, targets), sources in zip(self._targets.items(), case.places(1), strict=True):
            self._d.say(ExpectKV(request_id=RequestId(name), epoch=1, first_block=0, target_block_ids=targets))
            self._p.say(CachedSignal(span=KVSpan(RequestId(name), 1, 0, sources)))
        for _ in names:
            await self._d.hears(KVExpected)

    async def move(self) -> None:
        link = self._d.link
        for name, targets in self._targets.items():
            self._p.say(
                OpenTransfer(request_id=RequestId(name), epoch=1, link=link, first_block=0, target_block_ids=targets)
            )
        for _ in self._targets:
            await self._d.hears(KVArrived)

    async def finish(self) -> None:
        for _ in self._targets:
            done = await self._p.hears(TransferDone)
            assert done.link == self._link, done.link


# ---------------------------------------------------------------- links


class Round(NamedTuple):
    """One move: time on the clock, and CPU time of P's and D's process, if there are such."""

    wall_s: float
    cpu_s: list[float]


async def measure_links(cases: Sequence[Case], num_rounds: int) -> list[dict[str, list[Round]]]:
    """Return the rounds of each case, which all have one geometry, by what moved the blocks."""
    measured: list[dict[str, list[Round]]] = []
    geometry, num_blocks = cases[0].geometry, max(case.num_blocks for case in cases)
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvb-")))
        pools = {
            memory: [stack.enter_context(closing(make_pool_in(memory, geometry, num_blocks))) for _ in range(2)]
            for memory in get_args(Memory)
        }
        for p_pool, _ in pools.values():
            p_pool.planes[:] = np.random.default_rng(0).integers(0, 256, p_pool.planes.shape, np.uint8)
            wrote(p_pool)
        p_pool, d_pool = pools["host"]
        assert isinstance(p_pool, KVMemory)
        assert isinstance(d_pool, KVMemory)
        movers: dict[str, Mover] = {"memcpy": Memcpy(p_pool, d_pool)}
        for link, address in (("ipc", f"ipc://{directory}/bare"), ("tcp", "tcp://127.0.0.1:*")):
            movers[f"bare {link}"] = Bare(stack.enter_context(bare_zmq(link, address, p_pool, d_pool)))
        for name, kind in KINDS.items():
            settings = {
                "links": (kind.link,),
                "checksum": kind.checksum,
                "heartbeat_s": 1.0,
                "peer_timeout_s": 60.0,
                "log_level": "error",
            }
            p, d = [
                await stack.enter_async_context(messager_node(f"{role}{len(movers)}", directory, pool, **settings))
                for role, pool in zip("pd", pools[kind.memory], strict=True)
            ]
            movers[name] = Messagers(p, d, kind.link)
        for case in cases:
            rounds: defaultdict[str, list[Round]] = defaultdict(list)
            for number in range(-1, num_rounds):
                for name, mover in movers.items():
                    source, target = pools[KINDS[name].memory if name in KINDS else "host"]
                    target.planes[:, :, 0] = 0
                    took = await one_round(mover, case)
                    if number >= 0:
                        rounds[name].append(took)
                    elif isinstance(mover, Messagers):
                        sources, targets = (np.concatenate(case.places(seed)) for seed in (1, 2))
                        assert (source.planes[:, :, sources] == target.planes[:, :, targets]).all(), name
            measured.append(rounds)
    return measured


def make_pool_in(memory: Memory, geometry: KVGeometry, num_blocks: int) -> Pool:
    SimulatedBlocks.latency_s = BUSY_S if memory == "busy device" else 0.0
    return make_pool(geometry, num_blocks, on_device=memory != "host")


async def one_round(mover: Mover, case: Case) -> Round:
    await mover.prepare(case)
    before, began = [cpu_s([pid]) for pid in mover.pids], time.perf_counter()
    await mover.move()
    wall_s = time.perf_counter() - began
    await mover.finish()
    return Round(wall_s, [cpu_s([pid]) - at_first for pid, at_first in zip(mover.pids, before, strict=True)])


def links(console: Console, num_rounds: int) -> None:
    for _, group in groupby(CASES, lambda case: case.geometry):
        cases = list(group)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            measured = runner.run(measure_links(cases, num_rounds))
        for case, rounds in zip(cases, measured, strict=True):
            console.print(link_table(case, rounds))


def link_table(case: Case, rounds: dict[str, list[Round]]) -> Table:
    table = Table("moved by", title=f"{case}, best of {len(rounds['memcpy'])}")
    for heading in ("GB/s", "CPU ms P + D", "against", "best", "median", "aim"):
        table.add_column(heading, justify="right")
    for name, took in rounds.items():
        best_s = min(ours.wall_s for ours in took)
        cpu = [1e3 * min(values) for values in zip(*(ours.cpu_s for ours in took), strict=True)]
        row = [name, f"{case.size_bytes / best_s / 1e9:.2f}", " + ".join(f"{ms:.1f}" for ms in cpu)]
        kind = KINDS.get(name)
        if kind is not None and kind.is_compared:
            link = kind.link
            base = BASES[link]
            best = min(other.wall_s for other in rounds[base]) / best_s
            median = statistics.median(
                theirs.wall_s / ours.wall_s for ours, theirs in zip(took, rounds[base], strict=True)
            )
            row += [
                base,
                f"{best:.0%}",
                f"{median:.0%}",
                "" if kind.memory != "host" or link not in AIMS else verdict(median >= AIMS[link], f"{AIMS[link]:.0%}"),
            ]
        table.add_row(*row)
    return table


def verdict(is_met: bool, aim: str) -> str:
    return f"[green]{aim}: met[/]" if is_met else f"[red]{aim}: missed[/]"


# ---------------------------------------------------------------- overlap


def overlap(console: Console, preset: str, lengths: Sequence[int], num_prompts: int) -> None:
    table = Table("layerwise", title=f"{preset}, 1P1D, one prompt at a time, {num_prompts} of each kind")
    for heading in ("tokens", "prefill ms", "KV moves ms", "hidden", "aim", "exposed ms", "P's CPU", "aim"):
        table.add_column(heading, justify="right")
    for layerwise in (True, False):
        for length, prompts in measure_overlap(preset, lengths, num_prompts, layerwise=layerwise).items():
            table.add_row(*overlap_row(layerwise, length, prompts))
    console.print(table)


def overlap_row(layerwise: bool, length: int, prompts: Prompts) -> list[str]:
    took = prompts.with_transfer
    cost = min(prompts.cpu_s) / min(prompts.alone_cpu_s) - 1
    return [
        "on" if layerwise else "off",
        str(length),
        f"{1e3 * min(prompt.prefill_s for prompt in took):.0f}",
        f"{1e3 * statistics.median(prompt.moving_s for prompt in took):.1f}",
        f"{prompts.hidden:.1%}",
        verdict(prompts.hidden >= HIDDEN_AIM, f">= {HIDDEN_AIM:.0%}"),
        f"{1e3 * max(prompt.exposed_s for prompt in took):.1f}",
        f"{cost:+.1%}",
        verdict(cost < COST_AIM, f"< {COST_AIM:.0%}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["links", "overlap"])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each case of links")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of each length and kind for overlap")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--preset", default="qwen2-0.5b")
    arguments = parser.parse_args()
    console = Console(width=120)
    if "links" in arguments.parts:
        links(console, arguments.rounds)
    if "overlap" in arguments.parts:
        overlap(console, arguments.preset, arguments.tokens, arguments.prompts)


if __name__ == "__main__":
    main()
