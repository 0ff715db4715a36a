"""TTFT of each turn of chats whose turns alternate between prefill nodes: with and without a store.

Two prefill nodes alternate, so the node of turn n has not computed turn n - 1. With a store it reads the KV of the
previous turns, without one it computes all tokens since its own last turn. Two clusters (2P1D, real engine) in one run,
with the same chats, one request at a time.

Usage: python benchmarks/storage_chats.py [--preset qwen2-0.5b] [--chats 4] [--first 600] [--next 150] [--answer 24]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from support.completions import complete
from support.running_cluster import Config, cluster_config, running

NUM_TURNS = 6
THINKING_S = 0.5
"""Between an answer and the next question. Without it the first blocks may not be written yet when they are wanted."""


def config(storage: Config) -> Config:
    nodes: dict[str, Config] = {"p0": {"role": "prefill"}, "p1": {"role": "prefill"}, "d0": {"role": "decode"}}
    made = cluster_config(nodes, {"cache": {"num_blocks": 1024}, "storage": storage})
    made["router"]["prefill_routing"] = "round_robin"
    return made


async def hold(port: int, seed: int, arguments: argparse.Namespace) -> list[tuple[float, int]]:
    """Hold one chat; return the seconds to the first token of each turn, and how many prompt tokens were cached."""
    rng, history, turns = random.Random(seed), list[int](), []
    for turn in range(NUM_TURNS):
        history += [rng.randrange(3, 384) for _ in range(arguments.first if turn == 0 else arguments.next)]
        completion = await complete(port, history, arguments.answer, ignore_eos=True)
        history += completion.token_ids
        await asyncio.sleep(THINKING_S)
        turns.append((completion.ttft_s, completion.num_cached_tokens))
    return turns


async def hold_all(port: int, arguments: argparse.Namespace) -> list[list[tuple[float, int]]]:
    await hold(port, 1000, arguments)  # warms all nodes up
    return [await hold(port, seed, arguments) for seed in range(arguments.chats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="qwen2-0.5b")
    for name, default in (("chats", 4), ("first", 600), ("next", 150), ("answer", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    held: dict[str, list[list[tuple[float, int]]]] = {}
    with tempfile.TemporaryDirectory(prefix="kvb-") as path:
        stores: dict[str, Any] = {"none": {}, "file": {"backend": "file", "path": path, "capacity": "4GiB"}}
        for name, storage in stores.items():
            made = config(storage)
            with running(made, arguments.preset):
                held[name] = asyncio.run(hold_all(made["router"]["port"], arguments))
    table = Table(title=f"{arguments.preset}, medians of {arguments.chats} chats")
    for heading in ("turn", "TTFT none, ms", "file, ms", "ratio", "cached none", "cached file"):
        table.add_column(heading, justify="right")
    for turn in range(NUM_TURNS):
        none_s, file_s = (statistics.median(chat[turn][0] for chat in held[name]) for name in ("none", "file"))
        cached = (statistics.median(chat[turn][1] for chat in held[name]) for name in ("none", "file"))
        times = [f"{1e3 * none_s:.0f}", f"{1e3 * file_s:.0f}", f"{file_s / none_s:.2f}"]
        table.add_row(str(turn + 1), *times, *(f"{count:.0f}" for count in cached))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
