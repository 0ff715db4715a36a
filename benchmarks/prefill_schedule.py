"""What a prefill node gains from a scheduler of its own: 1P3D of real processes, chats of several turns.

    python benchmarks/prefill_schedule.py [--pairs N] [--explain]

Prints total time, TTFT and throughput for ``scheduler.prefill_policy`` ``shared`` (the baseline: P schedules as a node
that also decodes would) and ``dedicated`` in turn, on a fresh cluster each time, and what the prefill node did.

The nodes are as they would be for a model of the 8B class on 40 GB accelerators (``support/cost_model.py``): pools of
9,500 blocks, default limits (2,048 tokens and 64 requests per step). Fake engines take the time the model would, times
``TIME_SCALE``: what the machine's CPUs add weighs less that way. All times shown are the model's.

The load (``support/chats.py``): 78 chats of 2 to 8 turns, 39 at once, without pauses, each turn with the whole history
before it. The prefixes in use at one time take about half of P's pool. Answers depend on the prompt alone, so every run
does the same work.

``--explain`` adds one pair each under conditions that are meant to hurt the baseline, and runs with a smaller pool on
P: what a scheduler loses that evicts its prefix cache to keep a reserve free (``SharedPolicy`` does not).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table
from support.chats import ANSWER_MEAN, MAX_TOKENS, VOCAB_SIZE, ChatLoad
from support.cost_model import BLOCK_SIZE, COSTS, NUM_BLOCKS
from support.p_marks import held_up_s, mean_companions
from support.running_cluster import Config, cluster_config, running

from kvrelay.core.config import NewTokenRatioConfig

POLICIES = ("shared", "dedicated")
DECODE_NODES = ("d0", "d1", "d2")
TIME_SCALE = 1.25
SETTLE_S = 2.5
"""Two heartbeats: after that the nodes' loads tell of everything."""


@dataclass(frozen=True)
class Setting:
    """What differs between clusters."""

    title: str = "as deployed"
    policy: str = "shared"
    p_blocks: int = NUM_BLOCKS
    d_blocks: int = NUM_BLOCKS
    p_max_num_seqs: int = 64


STRESSES = (
    Setting("decode pools of 2,000 blocks, so that reservations are refused", d_blocks=2_000),
    Setting("decode pools of 1,500 blocks, and at most 8 requests on P", d_blocks=1_500, p_max_num_seqs=8),
)
SMALL_POOLS = (8_500, 6_500, 4_500)


def config(setting: Setting) -> Config:
    """Return the cluster of ``setting``; everything that is not here is the default."""
    costs = ("step_s", "prefill_token_s", "decode_token_s", "context_token_s")
    scaled = {name: TIME_SCALE * getattr(COSTS, name) for name in costs}
    kv = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 8}
    prefill: Config = {
        "role": "prefill",
        "cache": {"num_blocks": setting.p_blocks},
        "scheduler": {"prefill_policy": setting.policy, "max_num_seqs": setting.p_max_num_seqs},
    }
    decode: Config = {"role": "decode", "cache": {"num_blocks": setting.d_blocks}}
    return cluster_config(
        {"p0": prefill, **dict.fromkeys(DECODE_NODES, decode)},
        {
            "model": {"max_model_len": 32_768},
            "cache": {"block_size": BLOCK_SIZE},
            "engine": {
                "kind": "fake",
                "fake": {"vocab_size": VOCAB_SIZE, "eos_every": ANSWER_MEAN, **kv, **scaled},
            },
        },
    )


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class PrefillWork:
    """What P did: mean times of a request, then totals. Fields are shown by these names."""

    ms_until_it_has_blocks: float
    ms_from_there_to_its_first_token: float
    ms_from_there_until_its_kv_is_sent: float
    seconds_with_queued_prompts_and_none_running: float
    percent_busy: float
    steps: int
    computed_tokens: int
    percent_of_tokens_from_prefix_cache: float
    evicted_blocks: int
    most_blocks_used: int
    most_requests_sending: int
    blocks_a_reserve_would_keep: float
    reservations_refused: int
    percent_cpu_of_busiest_process: float


@dataclass(frozen=True)
class Run:
    """What one run gave."""

    total_s: float
    mean_ttft_s: float
    p90_ttft_s: float
    output_tokens: int
    prefill: PrefillWork

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.total_s


def measure(setting: Setting) -> Run:
    """Hold all chats on a fresh cluster."""
    cluster_settings = config(setting)
    with running(cluster_settings) as cluster, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        load = ChatLoad(cluster, cluster_settings["router"]["port"])
        cpu_before = cluster.cpu_s()
        wall_s = runner.run(load.run())
        cpu_s = max(spent - cpu_before.get(title, 0.0) for title, spent in cluster.cpu_s().items())
        time.sleep(SETTLE_S)
        ttfts_s = [completion.ttft_s / TIME_SCALE for completion in load.completions]
        return Run(
            total_s=wall_s / TIME_SCALE,
            mean_ttft_s=statistics.mean(ttfts_s),
            p90_ttft_s=statistics.quantiles(ttfts_s, n=10)[-1],
            output_tokens=sum(len(completion.token_ids) for completion in load.completions),
            prefill=prefill_work(load, cluster.loads(), wall_s, cpu_s),
        )


def prefill_work(load: ChatLoad, loads: dict[str, dict[str, Any]], wall_s: float, cpu_s: float) -> PrefillWork:
    marks, counters = load.marks, loads["p0"]["counters"]
    busy_s = TIME_SCALE * (counters["steps"] * COSTS.step_s + counters["prefill_tokens"] * COSTS.prefill_token_s)
    reserve = NewTokenRatioConfig().init * MAX_TOKENS / BLOCK_SIZE
    return PrefillWork(
        ms_until_it_has_blocks=mean_ms([mark.prefill_s - mark.queued_s for mark in marks]),
        ms_from_there_to_its_first_token=mean_ms([mark.first_token_s - mark.prefill_s for mark in marks]),
        ms_from_there_until_its_kv_is_sent=mean_ms([mark.transferred_s - mark.first_token_s for mark in marks]),
        seconds_with_queued_prompts_and_none_running=held_up_s(marks) / TIME_SCALE,
        percent_busy=100 * busy_s / wall_s,
        steps=int(counters["steps"]),
        computed_tokens=int(counters["prefill_tokens"]),
        percent_of_tokens_from_prefix_cache=100 * counters["prefix_hit_tokens"] / counters["prefix_query_tokens"],
        evicted_blocks=int(counters["evicted_blocks"]),
        most_blocks_used=max(sample["used_blocks"] for sample in load.samples),
        most_requests_sending=max(sample["num_sending"] for sample in load.samples),
        blocks_a_reserve_would_keep=mean_companions(marks) * reserve,
        reservations_refused=int(sum(loads[name]["counters"].get("reservations_refused", 0) for name in DECODE_NODES)),
        percent_cpu_of_busiest_process=100 * cpu_s / wall_s,
    )


def mean_ms(wall_s: Sequence[float]) -> float:
    return 1e3 * statistics.mean(wall_s) / TIME_SCALE


# ---------------------------------------------------------------- tables

MEASURES: dict[str, Callable[[Run], float]] = {
    "total s": lambda run: run.total_s,
    "mean TTFT ms": lambda run: 1e3 * run.mean_ttft_s,
    "P90 TTFT ms": lambda run: 1e3 * run.p90_ttft_s,
    "output tokens/s": lambda run: run.tokens_per_s,
}
REPORTED = {"total s": -0.143, "mean TTFT ms": -0.198, "P90 TTFT ms": -0.244, "output tokens/s": 0.167}
"""What FastDeploy #7944 reports for such a cluster and load."""

Pair = dict[str, Run]


def measure_pair(setting: Setting, console: Console) -> Pair:
    pair = {}
    for policy in POLICIES:
        pair[policy] = measure(replace(setting, policy=policy))
        told = ", ".join(f"{name} {value(pair[policy]):,.1f}" for name, value in MEASURES.items())
        console.print(f"{setting.title}, {policy}: {told}", highlight=False)
    return pair


def pairs_table(title: str, pairs: Sequence[Pair]) -> Table:
    """Return what each pair gave and, in the last rows, the median change and what FastDeploy reports."""
    table = Table("pair", "policy", title=title, title_justify="left")
    for name in MEASURES:
        table.add_column(name, justify="right")
    for number, pair in enumerate(pairs, 1):
        for policy, run in pair.items():
            table.add_row(str(number), policy, *(f"{value(run):,.1f}" for value in MEASURES.values()))
        table.add_row("", "change", *(f"{change(pair, value):+.1%}" for value in MEASURES.values()), end_section=True)
    medians = (statistics.median(change(pair, value) for pair in pairs) for value in MEASURES.values())
    table.add_row("median", "change", *(f"{median:+.1%}" for median in medians))
    table.add_row("", "FastDeploy", *(f"{REPORTED[name]:+.1%}" for name in MEASURES))
    return table


def change(pair: Pair, value: Callable[[Run], float]) -> float:
    return value(pair["dedicated"]) / value(pair["shared"]) - 1


def work_table(title: str, columns: dict[str, Sequence[Run]]) -> Table:
    """Return what P did in the median of some runs, a column for each key."""
    table = Table("prefill node", title=title, title_justify="left")
    works = {name: [asdict(run.prefill) for run in runs] for name, runs in columns.items()}
    for name in works:
        table.add_column(name, justify="right")
    for name in PrefillWork.__dataclass_fields__:
        medians = (statistics.median(work[name] for work in column) for column in works.values())
        table.add_row(name.replace("_", " "), *(f"{median:,.1f}".removesuffix(".0") for median in medians))
    return table


def small_pools_table(runs: dict[int, Run]) -> Table:
    table = Table("blocks on P", title="dedicated, with a smaller pool on P", title_justify="left")
    for name in (*MEASURES, "from prefix cache", "computed tokens"):
        table.add_column(name, justify="right")
    for num_blocks, run in runs.items():
        shares = (f"{run.prefill.percent_of_tokens_from_prefix_cache:.0f} %", f"{run.prefill.computed_tokens:,}")
        table.add_row(f"{num_blocks:,}", *(f"{value(run):,.1f}" for value in MEASURES.values()), *shares)
    return table


def explain(console: Console) -> None:
    for setting in STRESSES:
        pair = measure_pair(setting, console)
        console.print(pairs_table(setting.title, [pair]))
        console.print(work_table(setting.title, {policy: [run] for policy, run in pair.items()}))
    small = {num_blocks: measure(Setting(policy="dedicated", p_blocks=num_blocks)) for num_blocks in SMALL_POOLS}
    console.print(small_pools_table(small))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the schedulers a prefill node can have.")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each")
    parser.add_argument("--explain", action="store_true", help="other conditions too")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    pairs = [measure_pair(Setting(), console) for _ in range(arguments.pairs)]
    console.print(pairs_table("1P3D, 78 chats, 39 at once", pairs))
    console.print(work_table("as deployed", {policy: [pair[policy] for pair in pairs] for policy in POLICIES}))
    if arguments.explain:
        explain(console)


if __name__ == "__main__":
    main()
