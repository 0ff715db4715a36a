"""Decode steps of whole models with random weights, with the limit of their bytes next to each."""

from __future__ import annotations

import itertools
import statistics
import time
from unittest.mock import patch

import numpy as np

from gpu_check.context import Context
from gpu_check.driving import PLAIN, AheadDriver, Driver, Mode, engine_of, sequence
from gpu_check.profile import report_kernels
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.device.batch import Batch
from kvrelay.engine.device.decoder import Computed
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.graphs import StepGraph
from kvrelay.engine.device.operations import StepShape
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.protocol.request import Sequence

CONTEXT = 1152
"""Tokens: the middle of an output of 256 after a prompt of 1,024."""

BATCHES = (1, 32, 128, 256)
STEPS = 24


def run(context: Context) -> None:
    """Measure the 8B shape, then the small one."""
    for name in ("llama3-8b", "qwen3-0.6b"):
        measure(context, "decode", name, BATCHES)
        context.clean_up()


def weight_bytes(config: DecoderConfig, itemsize: int = 2) -> int:
    """Return the bytes of all matrices that a step of few tokens reads: all but the embedding's.

    ``itemsize``: of those of the layers; the head's is 2.
    """
    hidden = config.hidden_size
    layer = (
        config.qkv_size * hidden + config.num_heads * config.head_dim * hidden + 3 * config.intermediate_size * hidden
    )
    return itemsize * config.num_layers * layer + 2 * config.vocab_size * hidden


def kv_bytes(config: DecoderConfig, itemsize: int = 2) -> int:
    """Return the bytes of keys and values of one token."""
    return itemsize * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def measure(context: Context, part: str, name: str, batches: tuple[int, ...], mode: Mode = PLAIN) -> None:
    """Measure steps of several batches of a shape; what goes on around them only in the plain mode."""
    length, batches = (40, (1, 4)) if context.tiny else (CONTEXT, batches)
    blocks = -(-(length + 3 * STEPS) // 16) * batches[-1]
    engine = engine_of(
        context, name, num_blocks=blocks, max_num_seqs=batches[-1], tokens=max(512, batches[-1]),
        max_model_len=length + 1024, decode_graphs=batches, mode=mode,
    )  # fmt: skip
    _fill_pool(context, engine)
    config = context.config(name)
    num_bytes = weight_bytes(config, 1 if mode.fp8 else 2)
    for batch in batches:
        limit = (num_bytes + batch * length * kv_bytes(config)) / context.copy_bytes_per_s * 1e3
        driver = Driver(engine)
        running = [_prefilled(config, length, index) for index in range(batch)]
        whole, assembling = _whole_steps(engine, driver, running, 3 if context.tiny else STEPS)
        graph = engine.launcher.graphs.find(StepShape(batch, batch, 0, batch), 0)
        assert graph is not None
        with context.framework.on(engine.launcher.stream):
            device = context.seconds(graph.replay, repeats=3 if context.tiny else 20) * 1e3
        what = f"{name}, batch {batch}, context {length}{mode.suffix}"
        context.report.add(part, f"{what}, on the device", device, "ms", limit, f"{device / limit:.2f}x")
        if mode == PLAIN:
            context.report.add(part, f"{what}, whole run", whole * 1e3, "ms", limit, f"{whole * 1e3 / limit:.2f}x")
            context.report.add(part, f"{what}, host before the launch", assembling * 1e3, "ms")
            _report_two_in_flight(context, engine, driver, running, graph, what, limit)
        if context.device == "gpu" and (mode == PLAIN or batch == batches[0]):
            report_kernels(context, part, what, graph.replay)
        driver.give_back(running)
    engine.close()


def _fill_pool(context: Context, engine: DeviceEngine) -> None:
    """Zeros would be read faster than real keys and values."""
    with context.framework.on(engine.launcher.stream):
        for keys, values in engine.launcher.pool.layers:
            keys.normal_(0.0, 0.5)
            values.normal_(0.0, 0.5)
    engine.launcher.stream.synchronize()


def _prefilled(config: DecoderConfig, length: int, index: int) -> Sequence:
    """Return a sequence that counts as computed but for its newest token."""
    tokens = np.random.default_rng(index).integers(0, config.vocab_size, length).tolist()
    one = sequence(tokens, f"decode {index}")
    one.num_computed_tokens = length - 1
    return one


def _whole_steps(engine: DeviceEngine, driver: Driver, running: list[Sequence], steps: int) -> tuple[float, float]:
    """Return median seconds of ``run`` and of its part before the launch."""
    whole, before = [], []
    assemble = engine.launcher.assembler.assemble

    def timed(items: list[ScheduledSequence]) -> Batch:
        began = time.perf_counter()
        batch = assemble(items)
        before.append(time.perf_counter() - began)
        return batch

    with patch.object(engine.launcher.assembler, "assemble", timed):
        for _ in range(steps):
            plan = driver.plan([(one, 1) for one in running])
            began = time.perf_counter()
            result = engine.run(plan, lambda layers: None)
            whole.append(time.perf_counter() - began)
            driver.finish(result.sampled)
    return statistics.median(whole), statistics.median(before)


def _report_two_in_flight(
    context: Context, engine: DeviceEngine, driver: Driver, running: list[Sequence], graph: StepGraph, what: str,
    limit: float,
) -> None:  # fmt: skip
    """Measure steps that are launched while the one before is computed: their period, and what lies between them."""
    ahead, marks, replay = AheadDriver(driver), [], graph.replay
    steps = 4 if context.tiny else STEPS

    def marked() -> Computed:
        begin = context.mark(engine.launcher.stream)
        computed = replay()
        marks.append((begin, context.mark(engine.launcher.stream)))
        return computed

    with patch.object(graph, "replay", marked):
        for _ in range(steps):
            ahead.submit(running)
            if len(ahead.in_flight) == 2:
                ahead.finish_one()
        while ahead.in_flight:
            ahead.finish_one()
    pairs = list(itertools.pairwise(marks))[0 if context.tiny else 3 :]
    periods = [context.seconds_between(one[0], other[0]) for one, other in pairs]
    gaps = [context.seconds_between(one[1], other[0]) for one, other in pairs]
    period = statistics.median(periods) * 1e3
    context.report.add("decode", f"{what}, two in flight, period", period, "ms", limit, f"{period / limit:.2f}x")
    share = 100 * sum(gaps) / sum(periods)
    context.report.add("decode", f"{what}, two in flight, device between steps", share, "% of the period", 2.0)
    launch = statistics.median(ahead.launch_seconds[2:]) * 1e3
    context.report.add("decode", f"{what}, two in flight, host's launch", launch, "ms")
