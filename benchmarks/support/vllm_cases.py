"""The cases of vs_vllm.py: loads, the clusters that serve them, aims and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from support.limits import QWEN2, Limits
from support.running_cluster import Config

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
