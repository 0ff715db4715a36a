"""Overlap of transfer and prefill, and its cost on P: a real 1P1D cluster, one prompt at a time."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_check.stream_times import Prefilled, marks_of, prefilled
from support.completions import complete
from support.cpu_time import cpu_s
from support.running_cluster import RunningCluster, cluster_config, running

from kvrelay.cluster.client import ClusterClient

REPORT_TIMEOUT_S = 20.0
POLL_S = 0.05
VOCABULARY = 384


@dataclass
class Prompts:
    """All prompts of one length. CPU seconds are those of P and its messager, ``alone`` with KV that goes nowhere."""

    with_transfer: list[Prefilled] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    alone_cpu_s: list[float] = field(default_factory=list)

    @property
    def hidden(self) -> float:
        """The share of transfer time before the first token, median over prompts."""
        return statistics.median(prompt.hidden_s / prompt.moving_s for prompt in self.with_transfer)


def measure_overlap(preset: str, lengths: Sequence[int], rounds: int, *, layerwise: bool) -> dict[int, Prompts]:
    """Run a cluster and send it prompts, by turns ones that need a decode node and ones that do not."""
    nodes: dict[str, dict[str, Any]] = {"p0": {"role": "prefill"}, "d0": {"role": "decode"}}
    num_blocks = 2 * max(lengths) // 16
    sections = {"cache": {"num_blocks": num_blocks}, "transfer": {"layerwise": layerwise}}
    config = cluster_config(nodes, sections)
    measured = {length: Prompts() for length in lengths}
    with running(config, preset) as cluster:
        port = config["router"]["port"]
        asyncio.run(_one_of_each(cluster, port, min(lengths), 0, Prompts()))  # warms up
        for number in range(rounds):
            for length, prompts in measured.items():
                asyncio.run(_one_of_each(cluster, port, length, 1 + number, prompts))
    return measured


async def _one_of_each(cluster: RunningCluster, port: int, length: int, seed: int, prompts: Prompts) -> None:
    rng = random.Random(length * 1000 + seed)
    pids = cluster.pids("kvrelay prefill p0", "kvrelay messager p0")
    for max_tokens, last_mark, spent in ((2, "transferred", prompts.cpu_s), (1, "first_token", prompts.alone_cpu_s)):
        before_s = cpu_s(pids)
        tokens = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        completion = await complete(port, tokens, max_tokens, ignore_eos=True)
        timeline = _timeline(cluster.url, completion.request_id, last_mark)
        spent.append(cpu_s(pids) - before_s)
        if max_tokens > 1:
            prompts.with_transfer.append(prefilled(timeline))


def _timeline(url: str, request_id: str, mark: str) -> dict[str, Any]:
    """Return the timeline of a request that has just ended, once P has reported ``mark``."""
    deadline_s = time.monotonic() + REPORT_TIMEOUT_S
    with ClusterClient(url) as client:
        while True:
            timeline = client.timeline(request_id)
            if mark in marks_of(timeline, "p0"):
                return timeline
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"P did not report {mark!r} of {request_id} in time")
            time.sleep(POLL_S)
