"""Orders and policies of prompts on a prefill node: 1P3D of real processes.

    python benchmarks/prefill_schedule.py [--load chats|random|heavy-tail] [--pairs N] [--explain]
    python benchmarks/prefill_schedule.py --virtual SEEDS
    python benchmarks/prefill_schedule.py --mixed [--pairs N]

Compares ``scheduler.prefill_order`` ``shortest_first`` with ``fifo``, and ``scheduler.prefill_policy`` ``shared`` (P
schedules like a node that also decodes, in order of arrival) with ``fifo`` too, alternating, each on a fresh cluster:
total time, TTFT, throughput, and counters of the prefill node.

The nodes are sized for an 8B model on 40 GB accelerators (``support/cost_model.py``): pools of 9,500 blocks, default
limits (2,048 tokens and 64 requests per step). Fake engines take the model's time multiplied by ``TIME_SCALE``, which
reduces the effect of this machine's CPUs. All times shown are the model's.

The loads (``support/prompt_loads.py``): chats of several turns, 39 at once, each turn with the whole history before it;
prompts of random length at random times; the same with one prompt in a hundred 50 times as long. Answers depend only on
the prompt, so every run does the same work. Each round of three runs takes 4 to 5 minutes with chats, 3 to 4 with
the others.

``--virtual`` runs the same loads with this number of seeds on one prefill node in virtual time. It shows the effect of
the two parameters of the order: the bound, and to which prompts a begun prompt yields. It also runs short prompts on
a mixed node, where they share the steps with decodes.

``--mixed`` compares the orders on a mixed node with a real model on this CPU, prompts of 32 to 1,024 tokens.

``--explain`` adds one pair each under conditions that are meant to hurt ``shared``, and runs with a smaller pool on
P: what a scheduler loses that evicts its prefix cache to keep a reserve free (``SharedPolicy`` does not).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table
from support.chats import ANSWER_MEAN, MAX_TOKENS, VOCAB_SIZE
from support.client_load import ClientLoad
from support.cost_model import BLOCK_SIZE, COSTS, NUM_BLOCKS
from support.mixed_prompts import compare_on_a_mixed_node
from support.p_marks import held_up_s, mean_companions
from support.prefill_report import Latencies, rounds_table
from support.prompt_loads import LOADS
from support.running_cluster import Config, cluster_config, running
from support.virtual_orders import compare_in_virtual_time, compare_mixed_in_virtual_time

from kvrelay.config.cluster_config import NewTokenRatioConfig

DECODE_NODES = ("d0", "d1", "d2")
TIME_SCALE = 1.25
SETTLE_S = 2.5
"""Two heartbeats: after that the nodes' loads tell of everything."""


@dataclass(frozen=True)
class Setting:
    """What differs between clusters, and the load."""

    title: str = "as deployed"
    load: str = "chats"
    policy: str = "dedicated"
    order: str = "fifo"
    p_blocks: int = NUM_BLOCKS
    d_blocks: int = NUM_BLOCKS
    p_max_num_seqs: int = 64


CONTESTANTS: dict[str, dict[str, Any]] = {
    "fifo": {"order": "fifo"},
    "shortest_first": {"order": "shortest_first"},
    "shared": {"policy": "shared"},
}
"""By name what each sets; the others are compared with the first."""

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
        "scheduler": {
            "prefill_policy": setting.policy,
            "prefill_order": setting.order,
            "max_num_seqs": setting.p_max_num_seqs,
        },
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

    latencies: Latencies
    prefill: PrefillWork


def measure(setting: Setting) -> Run:
    """Send the whole load to a fresh cluster."""
    cluster_settings = config(setting)
    with running(cluster_settings) as cluster, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        load = ClientLoad(cluster, cluster_settings["router"]["port"], LOADS[setting.load](0), TIME_SCALE)
        cpu_before = cluster.cpu_s()
        wall_s = runner.run(load.run())
        cpu_s = max(spent - cpu_before.get(title, 0.0) for title, spent in cluster.cpu_s().items())
        time.sleep(SETTLE_S)
        return Run(
            latencies=Latencies.of(load.completions, wall_s, TIME_SCALE),
            prefill=prefill_work(load, cluster.loads(), wall_s, cpu_s),
        )


def prefill_work(load: ClientLoad, loads: dict[str, dict[str, Any]], wall_s: float, cpu_s: float) -> PrefillWork:
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

Round = dict[str, Run]


def measure_round(setting: Setting, console: Console) -> Round:
    """Measure every contestant once."""
    runs = {}
    for name, changes in CONTESTANTS.items():
        runs[name] = measure(replace(setting, **changes))
        console.print(f"{setting.title}, {setting.load}, {name}: {runs[name].latencies}", highlight=False)
    return runs


def latencies(rounds: Sequence[Round]) -> list[dict[str, Latencies]]:
    return [{name: run.latencies for name, run in runs.items()} for runs in rounds]


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
    table = Table("blocks on P", title="fifo, with a smaller pool on P", title_justify="left")
    for name in ("total s", "mean TTFT ms", "from prefix cache", "computed tokens"):
        table.add_column(name, justify="right")
    for num_blocks, run in runs.items():
        times = (f"{run.latencies.total_s:.1f}", f"{1e3 * run.latencies.mean_ttft_s:,.1f}")
        shares = (f"{run.prefill.percent_of_tokens_from_prefix_cache:.0f} %", f"{run.prefill.computed_tokens:,}")
        table.add_row(f"{num_blocks:,}", *times, *shares)
    return table


def explain(console: Console) -> None:
    for setting in STRESSES:
        runs = measure_round(setting, console)
        console.print(rounds_table(setting.title, latencies([runs])))
        console.print(work_table(setting.title, {name: [run] for name, run in runs.items()}))
    console.print(small_pools_table({num_blocks: measure(Setting(p_blocks=num_blocks)) for num_blocks in SMALL_POOLS}))


def compare(load: str, num_rounds: int, console: Console) -> None:
    rounds = [measure_round(Setting(load=load), console) for _ in range(num_rounds)]
    console.print(rounds_table(f"1P3D, {load}", latencies(rounds)))
    console.print(work_table(f"1P3D, {load}", {name: [runs[name] for runs in rounds] for name in CONTESTANTS}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the ways a prefill node can schedule prompts.")
    parser.add_argument("--load", choices=[*LOADS], default="chats")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each")
    parser.add_argument("--virtual", type=int, metavar="SEEDS", help="virtual time instead, all loads")
    parser.add_argument("--mixed", action="store_true", help="a mixed node with a real model instead")
    parser.add_argument("--explain", action="store_true", help="other conditions too")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if arguments.virtual:
        compare_in_virtual_time(arguments.virtual, console)
        compare_mixed_in_virtual_time(arguments.virtual, console)
    elif arguments.mixed:
        compare_on_a_mixed_node(arguments.pairs, console)
    else:
        compare(arguments.load, arguments.pairs, console)
        if arguments.explain:
            explain(console)


if __name__ == "__main__":
    main()
