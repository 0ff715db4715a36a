"""The orders of prompts on a mixed node that computes a real model on this CPU."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import uvloop
from rich.console import Console
from support.client_load import ClientLoad
from support.prefill_report import Latencies, rounds_table
from support.prompt_loads import Load, mixed_load
from support.running_cluster import cluster_config, running

PRESET = "qwen2-0.5b"
ORDERS = ("fifo", "shortest_first")
NUM_WARM_UP = 8
STEP_TOKENS = 512
"""More than the CPU needs to be busy, as docs/operations.md advises."""


def compare_on_a_mixed_node(num_rounds: int, console: Console) -> None:
    """Print what each order gave in turn, each time on a fresh node with other prompts than the round before."""
    rounds = []
    for number in range(num_rounds):
        runs = {}
        for order in ORDERS if number % 2 == 0 else reversed(ORDERS):
            runs[order] = measure(order, number)
            console.print(f"mixed, {order}: {runs[order]}", highlight=False)
        rounds.append({order: runs[order] for order in ORDERS})
    console.print(rounds_table(f"mixed node, {PRESET}, 16 at once, 32 to 1,024 tokens in, 32 out", rounds))


def measure(order: str, seed: int) -> Latencies:
    """Send the load of ``seed`` to a fresh node."""
    scheduler = {"prefill_order": order, "max_num_batched_tokens": STEP_TOKENS}
    sections = {"model": {"max_model_len": 4096}, "cache": {"num_blocks": 4096}, "scheduler": scheduler}
    config = cluster_config({"m0": {"role": "mixed", "threads": 2}}, sections)
    port = config["router"]["port"]
    with running(config, PRESET) as cluster, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ClientLoad(cluster, port, warm_up(seed), looks_at_p=False).run())
        load = ClientLoad(cluster, port, mixed_load(seed), looks_at_p=False)
        wall_s = runner.run(load.run())
    return Latencies.of(load.completions, wall_s)


def warm_up(seed: int) -> Load:
    """Return a few other prompts."""
    load = mixed_load(~seed)
    return replace(load, clients=load.clients[:NUM_WARM_UP])
