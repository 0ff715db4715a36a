"""kvrelay's engine against llama.cpp's: the same weights and cores, one request at a time, alternating.

The checkpoint is the shape of Qwen2-0.5B with random weights in bfloat16. llama.cpp reads it as GGUF, in bfloat16 and
in Q8_0; kvrelay in bfloat16 and in w8a8. Each round uses the same new prompt for all of them. There is no server:
times are those of the engines. TTFT is the time to the first token, TPOT the mean time of the later ones. The output
shows median and minimum. With one thread CPU time is used. llama.cpp is installed into its own environment on the first
run, from PyPI's ``llama-cpp-python`` and ``gguf``. It is compiled then, which takes some minutes and a C++ compiler.

Usage: python benchmarks/vs_llama_cpp.py [--rounds 5] [--threads 2] [--isa native|avx2] [--only kvrelay|llama.cpp]

``--isa avx2`` compiles llama.cpp, and limits oneDNN and kvrelay's own library, to what CPUs without AVX-512 have.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from support.prompt_jobs import Generated, PromptJob, prompt_job
from support.vllm_processes import random_model

PRESET = "qwen2-0.5b"
NUM_INPUT, NUM_OUTPUT = 512, 64
WARM_UP_OUTPUT = 2
HIGHEST_TOKEN = 8000
SUPPORT = Path(__file__).parent / "support"
OURS, THEIRS = "kvrelay", "llama.cpp"
AVX2_BUILD = ["GGML_NATIVE=OFF", *(f"GGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2"))]


@dataclass(frozen=True)
class Peer:
    """An engine that computes one way. ``against``: what of the other engine it is compared with."""

    engine: str
    kind: str
    against: str = ""

    def __str__(self) -> str:
        return f"{self.engine}, {self.kind}"


PEERS = (
    Peer(OURS, "bf16", "BF16"),
    Peer(THEIRS, "BF16"),
    Peer(OURS, "w8a8", "Q8_0"),
    Peer(THEIRS, "Q8_0"),
)


def make_environment(path: Path, isa: str) -> None:
    """Install llama.cpp for ``isa``: compiled for this CPU or for one with AVX2."""
    python = path / "bin" / "python"
    if python.exists() and not subprocess.run([python, "-c", "import gguf, llama_cpp"], check=False).returncode:
        return
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(path)], check=True)
    options = AVX2_BUILD if isa == "avx2" else ["GGML_NATIVE=ON"]
    variables = {**os.environ, "CMAKE_ARGS": " ".join(f"-D{one}" for one in [*options, "LLAVA_BUILD=OFF"])}
    install = [uv, "pip", "install", "--quiet", "--no-cache", "--python", str(python)]
    subprocess.run([*install, "llama-cpp-python>=0.3.16,<0.4", "gguf>=0.17"], check=True, env=variables)


def command_of(peer: Peer, model: Path, environment: Path, threads: int) -> list[str]:
    if peer.engine == OURS:
        quantization = "none" if peer.kind == "bf16" else peer.kind
        return [sys.executable, str(SUPPORT / "engine_job.py"), str(model), quantization, str(threads)]
    target = model.with_name(f"{model.name}-{peer.kind}.gguf")
    script = str(SUPPORT / "llama_cpp_job.py")
    return [str(environment / "bin" / "python"), script, str(model), str(target), peer.kind, str(threads)]


def measure(jobs: Mapping[Peer, PromptJob], num_rounds: int) -> dict[Peer, list[Generated]]:
    """Return what each gave for a prompt in each round. A round before them warms up."""
    rng = np.random.default_rng()
    answers: dict[Peer, list[Generated]] = {peer: [] for peer in jobs}
    for number in range(1 + num_rounds):
        prompt = rng.integers(3, HIGHEST_TOKEN, NUM_INPUT).tolist()
        for peer, job in jobs.items():
            answer = job.generate(prompt, NUM_OUTPUT if number else WARM_UP_OUTPUT)
            if number:
                answers[peer].append(answer)
                print(f"{peer}: TTFT {answer.ttft_ms:.0f} ms, TPOT {answer.tpot_ms:.1f} ms", file=sys.stderr)
    return answers


def same_beginning(ours: Sequence[Generated], theirs: Sequence[Generated]) -> str:
    """Return how many first tokens were the same: that both compute the same model."""
    same = sum(one.token_ids[0] == other.token_ids[0] for one, other in zip(ours, theirs, strict=True))
    return f"{same} of {len(ours)}"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown CPU")


def table(answers: Mapping[Peer, list[Generated]], threads: int, isa: str) -> Table:
    title = f"{PRESET}, {NUM_INPUT}/{NUM_OUTPUT}, {threads} threads of {cpu_name()}, instructions: {isa}"
    made = Table("engine", "TTFT, ms", "ratio", "TPOT, ms", "ratio", "same first token", title=title)
    for peer, ours in answers.items():
        theirs = answers.get(Peer(THEIRS, peer.against), [])
        cells, ttft, tpot = [str(peer)], [one.ttft_ms for one in ours], [one.tpot_ms for one in ours]
        for own, other in (ttft, [one.ttft_ms for one in theirs]), (tpot, [one.tpot_ms for one in theirs]):
            ratio = f"{statistics.median(own) / statistics.median(other):.2f}" if other else ""
            cells += [f"{statistics.median(own):.1f} (least {min(own):.1f})", ratio]
        made.add_row(*cells, same_beginning(ours, theirs) if theirs else "")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=["native", "avx2"], default="native")
    parser.add_argument("--only", choices=[OURS, THEIRS], help="measure one side")
    parser.add_argument("--llama-cpp", type=Path, help="environment; made if missing")
    arguments = parser.parse_args()
    environment = (arguments.llama_cpp or Path(f".kvrelay/llama-cpp-{arguments.isa}")).absolute()
    peers = [peer for peer in PEERS if arguments.only in (None, peer.engine)]
    if arguments.only != OURS:
        make_environment(environment, arguments.isa)
    model = random_model(PRESET)
    variables = {"ONEDNN_MAX_CPU_ISA": "AVX2"} if arguments.isa == "avx2" else {}
    with ExitStack() as stack:
        jobs = {}
        for peer in peers:
            command = command_of(peer, model, environment, arguments.threads)
            jobs[peer] = stack.enter_context(prompt_job(command, variables))
        answers = measure(jobs, arguments.rounds)
    Console(width=140).print(table(answers, arguments.threads, arguments.isa))


if __name__ == "__main__":
    main()
