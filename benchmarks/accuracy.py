"""Accuracy of bfloat16 relative to float32, for kvrelay and vLLM: log probabilities of the same tokens, greedy outputs.

The reference is kvrelay in float32. Each candidate is asked twice. Along the reference's own outputs: at each place the
log probabilities of the reference's TOP tokens, whose differences are the error, and whether the likeliest token is the
same; kvrelay computes them step by step as it decodes, vLLM as those of a prompt. And on its own, greedily: how many
outputs are the same to the end, and for how many tokens they are on average. The random checkpoint's log probabilities
lie close together, so tokens differ early there; the demo model is a trained one, asked what it was not trained on.

vLLM lives in an environment of its own (``--vllm``), made on the first run; its float32 is the reference's check.

Usage: python benchmarks/accuracy.py [--prompts 50] [--tokens 64] [--models random demo]
           [--quantization w8a8 w8a16] [--vllm DIR | --no-vllm]
       python benchmarks/accuracy.py --torch [--quantization fp8] --no-vllm
           the torch engine on the CPU, where float8 is emulated
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scripts")]
from demo_model.questions import questions
from demo_model.tokenizer import render
from support.bare_engine import BLOCK_SIZE, BareEngine, bare_engine
from support.limits import fastest_dtype
from support.vllm_processes import DEFAULT_ENVIRONMENT, make_environment, random_model, run_offline

from kvrelay.protocol.ids import BlockId

DEMO = Path(__file__).parents[1] / "models" / "demo"
HELD_OUT = 30_000
"""Seed of the demo model's questions; training draws its chats from other generators and seeds."""

SHORTEST, LONGEST = 16, 512
MAX_MODEL_LEN = 1024
TOP, NUM_LOGPROBS, NUM_LOGPROBS_OF_TORCH = 10, 100, 20
"""The tokens of the reference that are compared; so many of a candidate's are looked through for them."""

Logprobs = dict[int, float]
"""The likeliest tokens at one position."""


@dataclass
class Told:
    """Results of one side: greedy outputs, and the likeliest tokens at each position of the reference's outputs."""

    outputs: list[list[int]]
    logprobs: list[list[Logprobs]]


# ---------------------------------------------------------------- prompts


def random_prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 8000) for _ in range(rng.randint(SHORTEST, LONGEST))] for _ in range(count)]


def demo_prompts(count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    chats = [render(one.messages, add_generation_prompt=True) for one in questions(HELD_OUT, count, LONGEST)]
    return [tokenizer.encode(chat, add_special_tokens=False).ids for chat in chats]


# ---------------------------------------------------------------- kvrelay


def ask_kvrelay(
    model: Path, prompts: list[list[int]], num_tokens: int, forced: list[list[int]] | None, settings: list[str]
) -> Told:
    """Return what kvrelay says with ``settings``; without ``forced`` its own outputs take their place."""
    room = -(-(LONGEST + num_tokens) // BLOCK_SIZE)
    with bare_engine(model, room * len(prompts), MAX_MODEL_LEN, 2, settings) as engine:
        own = _follow(engine, prompts, num_tokens, room, None)
        along = own if forced is None else _follow(engine, prompts, num_tokens, room, forced)
        return Told(own.outputs, along.logprobs)


def settings_of(kind: str, is_torch: bool) -> list[str]:
    """Return the settings of a candidate in bfloat16 with quantization ``kind``."""
    return [*engine_settings(is_torch), "model.dtype=bfloat16", f"engine.quantization={kind}"]


def engine_settings(is_torch: bool) -> list[str]:
    return ["engine.kind=torch"] if is_torch else []


def _follow(
    engine: BareEngine, prompts: list[list[int]], num_tokens: int, room: int, forced: list[list[int]] | None
) -> Told:
    """Decode all prompts at once: after ``forced`` tokens whatever is sampled, or after what is sampled."""
    most = NUM_LOGPROBS if engine.engine.max_plans_in_flight == 1 else NUM_LOGPROBS_OF_TORCH
    sequences = [
        engine.sequence(prompt, list(map(BlockId, range(room * index, room * (index + 1)))), num_tokens, most)
        for index, prompt in enumerate(prompts)
    ]
    told = Told([[] for _ in prompts], [[] for _ in prompts])
    for place in range(num_tokens):
        for index, (sequence, sampled) in enumerate(zip(sequences, engine.advance(sequences), strict=True)):
            [entry], [token] = sampled.logprobs, sampled.token_ids
            told.outputs[index].append(token)
            told.logprobs[index].append(dict(zip(entry.top_token_ids, entry.top_logprobs, strict=True)))
            sequence.token_ids.append(token if forced is None else forced[index][place])
    return told


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Distance:
    """Differences of a candidate from the reference."""

    errors: np.ndarray
    """Candidate's minus reference's log probability, of each compared token; nan where the candidate's is unknown."""
    same_next: float
    """Share of positions with the same likeliest token."""
    same_outputs: float
    """Share of prompts with the same output."""
    common_prefix: float
    """Mean number of tokens until outputs differ."""

    @property
    def rms(self) -> float:
        return float(np.sqrt(np.nanmean(self.errors**2)))


def distance(candidate: Told, reference: Told) -> Distance:
    errors, same_next = [], []
    for ours, theirs in zip(candidate.logprobs, reference.logprobs, strict=True):
        for place, expected in zip(ours, theirs, strict=True):
            top = list(expected)[:TOP]
            errors += [place.get(token, np.nan) - expected[token] for token in top]
            same_next.append(max(place, key=place.__getitem__) == top[0])
    pairs = list(zip(candidate.outputs, reference.outputs, strict=True))
    return Distance(
        np.array(errors),
        float(np.mean(same_next)),
        float(np.mean([ours == theirs for ours, theirs in pairs])),
        float(np.mean([_common_prefix(ours, theirs) for ours, theirs in pairs])),
    )


def _common_prefix(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=True)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(left))


def table(title: str, distances: dict[str, Distance], num_tokens: int) -> Table:
    made = Table(title=title)
    headings = (
        "",
        "max error",
        "mean",
        "rms",
        "rms / vLLM's",
        "unknown",
        "next token",
        "outputs",
        f"of {num_tokens} tokens",
    )
    for heading in headings:
        made.add_column(heading, justify="left" if not heading else "right")
    theirs = distances.get("vLLM bfloat16")
    for name, one in distances.items():
        errors = np.abs(one.errors)
        made.add_row(
            name,
            f"{np.nanmax(errors):.5f}",
            f"{np.nanmean(errors):.5f}",
            f"{one.rms:.5f}",
            f"{one.rms / theirs.rms:.2f}" if theirs else "",
            str(int(np.isnan(errors).sum())),
            f"{100 * one.same_next:.1f} %",
            f"{100 * one.same_outputs:.0f} %",
            f"{one.common_prefix:.1f}",
        )
    return made


def compare(model: Path, prompts: list[list[int]], arguments: argparse.Namespace) -> dict[str, Distance]:
    """Return the differences of each candidate from kvrelay's float32."""
    num_tokens = arguments.tokens
    reference = ask_kvrelay(
        model, prompts, num_tokens, None, [*engine_settings(arguments.torch), "model.dtype=float32"]
    )
    forced = reference.outputs
    told = {}
    for kind in ("none", *arguments.quantization):
        name = f"kvrelay bfloat16{'' if kind == 'none' else f', {kind}'}"
        told[name] = ask_kvrelay(model, prompts, num_tokens, forced, settings_of(kind, arguments.torch))
    for dtype in () if arguments.no_vllm else ("bfloat16", "float32"):
        job = {"model": str(model), "dtype": dtype, "max_model_len": MAX_MODEL_LEN, "prompts": prompts}
        job |= {"forced": forced, "num_tokens": num_tokens, "num_logprobs": NUM_LOGPROBS}
        answer = run_offline(arguments.vllm.resolve(), job, 2)
        likely = [
            [{int(token): value for token, value in place.items()} for place in one] for one in answer["logprobs"]
        ]
        told[f"vLLM {dtype}"] = Told(answer["outputs"], likely)
    return {name: distance(one, reference) for name, one in told.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--models", nargs="+", choices=["random", "demo"], default=["random", "demo"])
    parser.add_argument("--quantization", nargs="+", choices=["w8a8", "w8a16", "fp8"], default=[])
    parser.add_argument("--torch", action="store_true", help="measure the torch engine")
    parser.add_argument("--vllm", type=Path, default=DEFAULT_ENVIRONMENT, help="environment; made if missing")
    parser.add_argument("--no-vllm", action="store_true", help="kvrelay's own numbers only")
    arguments = parser.parse_args()
    if not arguments.torch and fastest_dtype() != "bfloat16":
        sys.exit("this CPU has no bf16 GEMMs: kvrelay computes in float32 here, which is the reference")
    if not arguments.no_vllm:
        make_environment(arguments.vllm.resolve())
    console = Console(width=130)
    for kind in arguments.models:
        model, prompts = DEMO, demo_prompts(arguments.prompts)
        if kind == "random":
            model, prompts = random_model("qwen2-0.5b"), random_prompts(arguments.prompts)
        title = f"{kind} model, {len(prompts)} prompts, {arguments.tokens} tokens each, against kvrelay float32"
        console.print(table(title, compare(model, prompts, arguments), arguments.tokens))


if __name__ == "__main__":
    main()
