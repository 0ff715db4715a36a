"""Reserve policies on a node with more requests than blocks, and long outputs.

    python benchmarks/reserve.py [--seeds N] [--shapes]

The real state machine of a decode node and of a mixed node runs in virtual time (``support/virtual_node.py``). Steps
take the time of a large model's cost model (``support/cost_model.py``), and nothing else takes time. Runs are therefore
exactly reproducible. The tables show medians over the seeds of the workload.

Each client sends its next request when the last one has ended. Prompts and outputs have log-normal lengths. Outputs use
30 % of ``max_tokens`` on average. There are one and a half times as many clients as the pool can hold. Throughput
counts output tokens until the last request was sent.

The baseline is ``none``, which admits every request that fits and preempts later. The default must have at least 98 %
of its throughput and at most a third of its preemptions.

``--shapes`` repeats the comparison, on the decode node, with outputs that use less and more of their ``max_tokens``,
and with a lower ``min`` of the default's ratio.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from support.cost_model import BLOCK_SIZE, NUM_BLOCKS
from support.virtual_node import EOS, Job, Measured, VirtualNode

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import RequestSpec, SamplingParams
from kvrelay.runtime.gc_tuning import tune_gc

NUM_CLIENTS = 128
NUM_REQUESTS = 1_024
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2_048
PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_MAX = 500, 0.7, 8_192

GEOMETRY = KVGeometry(32, 8, 128, BLOCK_SIZE, "bfloat16", "benchmark")


@dataclass(frozen=True)
class Outputs:
    """Log-normal lengths of outputs, cut off at ``max_tokens``."""

    median: int
    sigma: float
    max_tokens: int

    def __str__(self) -> str:
        share = statistics.mean(job.num_output_tokens for job in jobs(self, 1)) / self.max_tokens
        return f"median {self.median}, sigma {self.sigma}, {share:.0%} of max_tokens {self.max_tokens:,}"


LONG = Outputs(900, 0.8, 4_096)
SHAPES = (Outputs(500, 0.8, 4_096), LONG, Outputs(1_200, 0.4, 2_048))


@dataclass(frozen=True)
class Policy:
    """A reserve policy; ``ratio_min`` is new_token_ratio's, if not the default one."""

    name: str
    ratio_min: float | None = None

    def __str__(self) -> str:
        return self.name if self.ratio_min is None else f"{self.name}, min {self.ratio_min:g}"

    @property
    def config(self) -> dict[str, object]:
        ratio = {} if self.ratio_min is None else {"new_token_ratio": {"min": self.ratio_min}}
        return {"reserve_policy": self.name, **ratio}


BASELINE, DEFAULT = Policy("none"), Policy("new_token_ratio")
POLICIES = (BASELINE, DEFAULT, Policy("fixed_blocks"), Policy("sglang"))
VARIANTS = (BASELINE, DEFAULT, Policy("new_token_ratio", 0.05), Policy("fixed_blocks"))


@dataclass(frozen=True)
class Case:
    """One run: which node, with which policy, for which workload."""

    role: str
    policy: Policy
    outputs: Outputs
    seed: int

    def run(self) -> Measured:
        tune_gc()
        return VirtualNode(node(self.role, self.policy), GEOMETRY, jobs(self.outputs, self.seed), NUM_CLIENTS).run()


def node(role: str, policy: Policy) -> NodeConfig:
    limits = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS}
    return NodeConfig.model_validate(
        {
            "name": "n0",
            "role": role,
            "port": 1,
            "cache": {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS},
            "scheduler": {**limits, **policy.config},
        }
    )


def jobs(outputs: Outputs, seed: int) -> list[Job]:
    rng = random.Random(seed)
    hasher = BlockHasher(GEOMETRY.model_digest, BLOCK_SIZE)
    sampling = SamplingParams(max_tokens=outputs.max_tokens, seed=0, eos_token_ids=[EOS])
    made = []
    for number in range(NUM_REQUESTS):
        prompt = rng.choices(range(50_000), k=length(rng, PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_MAX))
        spec = RequestSpec(request_id=RequestId(f"r{number}"), epoch=1, prompt_token_ids=prompt, sampling=sampling)
        num_output_tokens = length(rng, outputs.median, outputs.sigma, outputs.max_tokens)
        made.append(Job(spec, hasher.hashes(prompt), num_output_tokens))
    return made


def length(rng: random.Random, median: float, sigma: float, longest: int) -> int:
    return max(2, min(longest, round(median * rng.lognormvariate(0.0, sigma))))


# ---------------------------------------------------------------- tables

Results = dict[Policy, Sequence[Measured]]


def tokens_per_s(run: Measured) -> float:
    return run.busy_tokens / run.busy_s


def preemptions(run: Measured) -> float:
    return run.preemptions


def recomputed(run: Measured) -> float:
    return run.recomputed_tokens


def p99_itl_ms(run: Measured) -> float:
    return 1e3 * statistics.quantiles(run.itl_s, n=100)[-1]


def measure(pool: ProcessPoolExecutor, role: str, policies: Sequence[Policy], outputs: Outputs, seeds: int) -> Results:
    cases = [Case(role, policy, outputs, seed) for policy in policies for seed in range(1, seeds + 1)]
    measured = list(pool.map(Case.run, cases))
    return {policy: measured[at * seeds : (at + 1) * seeds] for at, policy in enumerate(policies)}


def median(runs: Sequence[Measured], value: Callable[[Measured], float]) -> float:
    return statistics.median(value(run) for run in runs)


def ratio(runs: Sequence[Measured], baseline: Sequence[Measured], value: Callable[[Measured], float]) -> float:
    """Return the median over seeds of ``value`` compared with the baseline's in the same seed."""
    return statistics.median(value(run) / value(other) for run, other in zip(runs, baseline, strict=True))


def results_table(title: str, results: Results) -> Table:
    """Return what each policy gave, in brackets compared with none."""
    table = Table("policy", title=title, title_justify="left")
    for heading in ("output tokens/s", "preemptions", "recomputed tokens", "P99 ITL ms", "decodes/step", "kept free"):
        table.add_column(heading, justify="right")
    baseline = results[BASELINE]
    for policy, runs in results.items():
        table.add_row(
            str(policy),
            f"{median(runs, tokens_per_s):,.0f} ({ratio(runs, baseline, tokens_per_s) - 1:+.1%})",
            f"{median(runs, preemptions):,.0f} ({ratio(runs, baseline, preemptions):.2f}x)",
            f"{median(runs, recomputed):,.0f} ({ratio(runs, baseline, recomputed):.2f}x)",
            f"{median(runs, p99_itl_ms):.1f} ({ratio(runs, baseline, p99_itl_ms):.2f}x)",
            f"{median(runs, lambda run: statistics.mean(run.step_decodes)):.1f}",
            f"{median(runs, lambda run: statistics.mean(run.step_kept_free)):,.0f} blocks",
        )
    return table


def verdict(results: Results) -> str:
    default, baseline = results[DEFAULT], results[BASELINE]
    fast = ratio(default, baseline, tokens_per_s)
    rare = ratio(default, baseline, preemptions)
    told = [f"throughput {fast - 1:+.1%} (aim: -2 % or better): {met(fast >= 0.98)}"]
    told += [f"preemptions {rare:.2f}x (aim: a third or less): {met(rare <= 1 / 3)}"]
    return f"{DEFAULT} against {BASELINE}: " + "; ".join(told) + "\n"


def met(fine: bool) -> str:
    return "[green]met[/]" if fine else "[red]missed[/]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare reserve policies under an overload of long outputs.")
    parser.add_argument("--seeds", type=int, default=1, help="workloads per policy")
    parser.add_argument("--shapes", action="store_true", help="other lengths of outputs too")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    with ProcessPoolExecutor() as pool:
        for role in ("decode", "mixed"):
            results = measure(pool, role, POLICIES, LONG, arguments.seeds)
            console.print(results_table(f"{role} node, outputs: {LONG}", results), verdict(results))
        for outputs in SHAPES if arguments.shapes else ():
            results = measure(pool, "decode", VARIANTS, outputs, arguments.seeds)
            console.print(results_table(f"decode node, outputs: {outputs}", results), verdict(results))


if __name__ == "__main__":
    main()
