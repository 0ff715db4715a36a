"""The orders of prompts on one prefill node in virtual time, over many seeds and settings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from support.chats import MAX_TOKENS
from support.cost_model import BLOCK_SIZE, NUM_BLOCKS
from support.prefill_report import percentile
from support.prompt_loads import LOADS, MIXED_AT_ONCE, Load, mixed_load
from support.virtual_node import EOS, Job, VirtualNode
from support.virtual_prefill import Measured, VirtualPrefillNode

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.node.prefill_order import BEGUN_WEIGHT
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import RequestSpec, SamplingParams

GEOMETRY = KVGeometry(1, 1, 8, BLOCK_SIZE, "uint8", "benchmark")
OVERTAKE_TOKENS = (4_096, 8_192, 12_288, 16_384, 32_768, 1 << 30)
BEGUN_WEIGHTS = (0.0, 0.25, 1.0)
"""Weights of a begun prompt: 0 never yields, 1 yields to any prompt shorter than its remaining tokens."""

Figures = dict[str, float]


def compare_in_virtual_time(num_seeds: int, console: Console) -> None:
    """Print a table for each load: ``fifo`` in absolute numbers, and each other setting relative to it."""
    for name, make_load in LOADS.items():
        loads = [make_load(seed) for seed in range(num_seeds)]
        baseline = [figures(run(load, "fifo")) for load in loads]
        rows = {
            f"up to {tokens:,} tokens" if tokens < 1 << 30 else "no bound": [
                figures(run(load, "shortest_first", prefill_overtake_tokens=tokens)) for load in loads
            ]
            for tokens in OVERTAKE_TOKENS
        }
        for weight in BEGUN_WEIGHTS:
            rows[f"begun weighs {weight:g}"] = [
                figures(run(load, "shortest_first", begun_weight=weight)) for load in loads
            ]
        console.print(_table(name, baseline, rows))


def compare_mixed_in_virtual_time(num_seeds: int, console: Console) -> None:
    """Print what the orders do on a mixed node, where prompts and decodes share the steps."""
    loads = [mixed_load(seed) for seed in range(num_seeds)]
    baseline = [mixed_figures(load, "fifo") for load in loads]
    rows = {"shortest_first": [mixed_figures(load, "shortest_first") for load in loads]}
    console.print(_table(f"mixed node, {MIXED_AT_ONCE} at once", baseline, rows))


def mixed_figures(load: Load, order: str) -> Figures:
    """Return what a mixed node of the model of ``cost_model`` gives under ``load``."""
    config = node("mixed", prefill_order=order, max_num_batched_tokens=512)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=0, eos_token_ids=[EOS])
    jobs = []
    for number, client in enumerate(load.clients):
        spec = RequestSpec(
            request_id=RequestId(f"r{number}"), epoch=1, prompt_token_ids=client.messages[0], sampling=sampling
        )
        jobs.append(Job(spec, [], load.max_tokens or MAX_TOKENS))
    measured = VirtualNode(config, GEOMETRY, jobs, load.num_at_once).run()
    return {
        "total s": measured.total_s,
        "mean TTFT s": statistics.mean(measured.ttft_s),
        "P50": percentile(measured.ttft_s, 0.5),
        "P90": percentile(measured.ttft_s, 0.9),
        "P99": percentile(measured.ttft_s, 0.99),
        "mean ITL s": statistics.mean(measured.itl_s),
        "P99 ITL s": percentile(measured.itl_s, 0.99),
    }


def node(role: str, **scheduler: Any) -> NodeConfig:
    """Return the config of a node for the model of ``cost_model``."""
    cache = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS}
    return NodeConfig.model_validate({"name": "n0", "role": role, "port": 1, "cache": cache, "scheduler": scheduler})


def run(load: Load, order: str, *, begun_weight: float = BEGUN_WEIGHT, **scheduler: Any) -> Measured:
    """Serve ``load`` on a fresh node."""
    config = node("prefill", prefill_order=order, **scheduler)
    return VirtualPrefillNode(config, GEOMETRY, load, begun_weight).run()


def figures(measured: Measured) -> Figures:
    """Return what the tables show of one run."""
    ttfts_s = [turn.ttft_s for turn in measured.turns]
    return {
        "total s": measured.total_s,
        "mean TTFT s": statistics.mean(ttfts_s),
        "P50": percentile(ttfts_s, 0.5),
        "P90": percentile(ttfts_s, 0.9),
        "P99": percentile(ttfts_s, 0.99),
        "longest": max(ttfts_s),
        "longest wait s": max(turn.wait_s for turn in measured.turns),
        "most blocks used": measured.most_used_blocks,
        "most begun": measured.most_begun,
        "switches": measured.num_switches,
    }


_COUNTS = ("most begun", "switches")


def _table(load: str, baseline: Sequence[Figures], rows: Mapping[str, Sequence[Figures]]) -> Table:
    table = Table(title=f"{load}: fifo, and shortest_first relative to it; medians of {len(baseline)} seeds")
    table.add_column("setting")
    for name in baseline[0]:
        table.add_column(name, justify="right")
    table.add_row("fifo", *(f"{statistics.median(run[name] for run in baseline):,.2f}" for name in baseline[0]))
    for setting, runs in rows.items():
        cells = []
        for name in baseline[0]:
            if name in _COUNTS:
                cells.append(f"{statistics.median(run[name] for run in runs):,.0f}")
            else:
                ratios = (mine[name] / base[name] for mine, base in zip(runs, baseline, strict=True))
                cells.append(f"{statistics.median(ratios):.2f}")
        table.add_row(setting, *cells)
    return table
