"""Loads of streamed completions on clusters with random weights, with the limits of their bytes and operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpu_check.cluster_room import BLOCK, Room
from gpu_check.decode import kv_bytes, weight_bytes
from gpu_check.jobs import Answer
from gpu_check.prefill import flops
from gpu_check.processes import Cluster
from gpu_check.stream_times import Stream, marks_of, prefilled, together, tokens_per_s

MODELS = ("llama3-8b", "qwen3-8b", "qwen3-0.6b")
"""The most important first."""

VLLM_MS = {
    "llama3-8b": {1: 4.87, 32: 6.42, 256: 16.2},
    "qwen3-8b": {1: 5.08, 32: 6.67, 256: 17.6},
    "qwen3-0.6b": {1: 1.55, 32: 2.44, 256: 9.5},
}
"""vLLM's public TPOT for prompts of 1,024 and outputs of 256 tokens on an H200, by batch."""

REPORTS_S = 10.0


def measure_mixed(room: Room, name: str, cluster: Cluster) -> None:
    """Measure a mixed node: batches of several sizes, and a burst of shorter outputs."""
    sizes = room.sizes
    try:
        room.up(cluster)
        room.ask(cluster, room.asks(name, sizes.burst // 2, 8))
        for batch in sizes.batches[:2]:
            _batch(room, name, cluster, batch)
        _burst(room, name, cluster)
        for batch in sizes.batches[2:]:
            if batch > room.largest_batch[name]:
                room.add(f"{name}: largest batch whose KV fits on the device", room.largest_batch[name])
                continue
            _batch(room, name, cluster, batch)
        preemptions = cluster.counters("m0").get("preemptions", 0)
        assert not preemptions, f"{cluster.name}: {preemptions} preemptions"
        cluster.stop()
    finally:
        cluster.kill()


def _batch(room: Room, name: str, cluster: Cluster, batch: int) -> None:
    """Measure ``batch`` requests at once; a single one twice."""
    sizes, config = room.sizes, room.context.config(name)
    began_s, used = time.monotonic(), cluster.cpu_seconds()
    streams, alone = [], 2 if batch == 1 else 1
    for _ in range(alone):
        answers = room.ask(cluster, room.asks(name, batch, sizes.output))
        streams.append([answer.stream for answer in answers])
    cpus = _cpus(cluster, used, time.monotonic() - began_s)
    length = sizes.prompt + sizes.output // 2
    limit = (weight_bytes(config) + batch * length * kv_bytes(config)) / room.context.copy_bytes_per_s * 1e3
    what = f"{cluster.name}, batch {batch}, {sizes.prompt}/{sizes.output}"
    every = [one for its in streams for one in its]
    tpot = statistics.mean(one.tpot_s for one in every) * 1e3
    room.add(f"{what}: TPOT, mean", tpot, "ms", limit, _beside_vllm(name, batch, tpot))
    if all_decode := together(streams[-1]):
        seconds = all_decode.median_s * 1e3
        note = f"mean {all_decode.mean_s * 1e3:.2f}, p99 {all_decode.p99_s * 1e3:.2f} ms, "
        note += f"{all_decode.num_tokens} tokens of each; {_beside_vllm(name, batch, seconds)}"
        room.add(f"{what}: between tokens while all decode, median", seconds, "ms", limit, note)
    ttft = [one.ttft_s * 1e3 for one in every]
    note = f"longest {max(ttft):.1f} ms; {tokens_per_s(streams[-1]):.0f} tokens/s; CPUs: {cpus}"
    room.add(f"{what}: TTFT, median", statistics.median(ttft), "ms", None, note)


def _beside_vllm(name: str, batch: int, milliseconds: float) -> str:
    vllm = VLLM_MS[name].get(batch)
    return "not in vLLM's tables" if vllm is None else f"{milliseconds / vllm:.2f}x of vLLM's {vllm} ms on an H200"


def _cpus(cluster: Cluster, used: dict[str, float], seconds: float) -> str:
    """Return the share of a CPU that each process has taken since it had ``used``."""
    now = cluster.cpu_seconds()
    shares = {title.removeprefix("kvrelay "): (now[title] - used.get(title, 0.0)) / seconds for title in now}
    return ", ".join(f"{title} {share:.2f}" for title, share in sorted(shares.items()) if share > 0.02)


def _burst(room: Room, name: str, cluster: Cluster) -> None:
    """Measure requests at once whose outputs are shorter, as tokens a second."""
    sizes, config, context = room.sizes, room.context.config(name), room.context
    answers = room.ask(cluster, room.asks(name, sizes.burst, sizes.burst_output))
    streams = [answer.stream for answer in answers]
    steps = sizes.burst_output - 1
    num_bytes = steps * weight_bytes(config)
    num_bytes += sizes.burst * kv_bytes(config) * sum(range(sizes.prompt, sizes.prompt + steps))
    seconds = num_bytes / context.copy_bytes_per_s
    seconds += sizes.burst * flops(config, sizes.prompt) / context.gemm_flops_per_s
    limit, rate = sizes.burst * sizes.burst_output / seconds, tokens_per_s(streams)
    tpot = statistics.mean(one.tpot_s for one in streams) * 1e3
    what = f"{cluster.name}, {sizes.burst} x {sizes.prompt}/{sizes.burst_output} at once: output"
    note = f"{rate / limit:.2f} of the limit; TPOT {tpot:.2f} ms, TTFT {_median_ttft(streams):.1f} ms"
    room.add(what, rate, "tokens/s", limit, note)


def _median_ttft(streams: Sequence[Stream]) -> float:
    return statistics.median(one.ttft_s for one in streams) * 1e3


# ---------------------------------------------------------------- a prefill and a decode node


def measure_disaggregated(room: Room, name: str) -> None:
    """Measure a prefill and a decode node that share the device, with the cuda link."""
    sizes = room.sizes
    blocks = 2 * sizes.burst * -(-(sizes.prompt + sizes.burst_output) // BLOCK)
    sections = {
        "model": room.model(name),
        "engine": room.engine(),
        "transfer": {"link": "cuda"},
        "cache": {"block_size": BLOCK, "num_blocks": blocks},
        "scheduler": {"max_num_seqs": 2 * sizes.burst, "max_num_batched_tokens": sizes.step_tokens},
    }
    nodes = {"p0": {"role": "prefill"}, "d0": {"role": "decode"}}
    cluster = room.start(f"{name} P and D, cuda link", nodes, sections)
    try:
        room.up(cluster)
        for _ in range(3):
            room.ask(cluster, room.asks(name, 1, 8))
        room.ask(cluster, room.asks(name, sizes.burst // 2, 8))
        single = [room.ask(cluster, room.asks(name, 1, sizes.burst_output // 2))[0] for _ in range(5)]
        _report_moves(room, cluster, "single", single)
        _report_moves(room, cluster, f"{sizes.burst} at once", _at_once(room, name, cluster))
        staggered = room.asks(name, sizes.burst, sizes.burst, gap_s=0.1)
        _report_moves(room, cluster, "every 100 ms", room.ask(cluster, staggered))
        cluster.stop()
    finally:
        cluster.kill()


def _at_once(room: Room, name: str, cluster: Cluster) -> list[Answer]:
    sizes = room.sizes
    answers = room.ask(cluster, room.asks(name, sizes.burst, sizes.burst_output))
    rate = tokens_per_s([answer.stream for answer in answers])
    room.add(f"{cluster.name}, {sizes.burst} x {sizes.prompt}/{sizes.burst_output} at once: output", rate, "tokens/s")
    return answers


def _report_moves(room: Room, cluster: Cluster, load: str, answers: list[Answer]) -> None:
    """Report what clients saw of a load and how long its KV came after the first token."""
    streams = [answer.stream for answer in answers]
    tpot = statistics.mean(one.tpot_s for one in streams) * 1e3
    second = statistics.median(one.chunk_s[1] - one.chunk_s[0] for one in streams) * 1e3
    note = f"TPOT {tpot:.2f} ms; from the first token to the second {second:.2f} ms"
    room.add(f"{cluster.name}, {load}: TTFT, median", _median_ttft(streams), "ms", None, note)
    moves = _moves(cluster, answers)
    exposed = [move.exposed_s * 1e3 for move in moves]
    note = f"worst {max(exposed):.1f} ms; hidden share {statistics.median(move.hidden for move in moves):.3f}; "
    note += f"{moves[0].num_bytes / 1e6:.0f} MB each, P computed {statistics.median(m.prefill_s for m in moves):.3f} s"
    what = f"{cluster.name}, {load}: KV of {room.sizes.prompt} tokens exposed after the first token, median"
    room.add(what, statistics.median(exposed), "ms", None, note)


class Moved(NamedTuple):
    """How long a prompt was computed, its KV was still missing on D after the first token, and was hidden before it."""

    prefill_s: float
    exposed_s: float
    hidden: float
    num_bytes: int


def _moves(cluster: Cluster, answers: list[Answer]) -> list[Moved]:
    return [_moved(_timeline(cluster, answer.request_id)) for answer in answers]


def _moved(timeline: dict[str, Any]) -> Moved:
    of_p = prefilled(timeline)
    exposed_s = marks_of(timeline, "d0")["kv_arrived"] - marks_of(timeline, "p0")["first_token"]
    return Moved(of_p.prefill_s, max(0.0, exposed_s), of_p.hidden_s / of_p.moving_s, timeline["kv_bytes_moved"])


def _timeline(cluster: Cluster, request_id: str) -> dict[str, Any]:
    """Return the timeline of a request that has ended, once both nodes have reported theirs."""
    until_s = time.monotonic() + REPORTS_S
    while True:
        timeline = cluster.timeline(request_id)
        if "transferred" in marks_of(timeline, "p0") and "kv_arrived" in marks_of(timeline, "d0"):
            return timeline
        if time.monotonic() > until_s:
            raise RuntimeError(f"the nodes did not report their part of {request_id}: {timeline['marks']}")
        time.sleep(0.05)
