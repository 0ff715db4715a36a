"""Prefill steps of whole models with random weights, as a share of what the card's largest GEMM reaches."""

from __future__ import annotations

import statistics
import time
from functools import partial

import numpy as np

from gpu_check.context import Context
from gpu_check.decode import weight_bytes
from gpu_check.driving import PLAIN, Driver, Mode, engine_of, sequence
from gpu_check.profile import report_kernels
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.device.engine import DeviceEngine


def run(context: Context) -> None:
    """Measure the 8B shape, then the small one, which its launches bound: with and without graphs."""
    lengths = (40,) if context.tiny else (512, 2048, 8192)
    measure(context, "prefill", "llama3-8b", lengths)
    context.clean_up()
    short = (40,) if context.tiny else (128, 512, 1024)
    measure(context, "prefill", "qwen3-0.6b", short)
    context.clean_up()
    measure(context, "prefill", "qwen3-0.6b", short, chunk_graphs=short)


LONG = 2048
"""Tokens from which the card's power counts: it slows down after a tenth of a second."""


def flops(config: DecoderConfig, length: int) -> float:
    """Return the operations of a prompt of ``length`` tokens whose last one samples."""
    head = config.vocab_size * config.hidden_size
    matrices = weight_bytes(config) / 2 - head
    attention = 2 * 2 * config.num_layers * config.num_heads * config.head_dim * length * (length + 1) / 2
    return 2 * matrices * length + attention + 2 * head


def _seconds(
    engine: DeviceEngine, driver: Driver, config: DecoderConfig, length: int, count: int, pause: float
) -> float:
    """Return the median time of a prompt, of some that follow each other, or of some with pauses between them."""
    times = []
    for index in range(count):
        time.sleep(pause)
        tokens = np.random.default_rng(index).integers(0, config.vocab_size, length).tolist()
        one = sequence(tokens, f"prefill {index}")
        plan = driver.plan([(one, length)])
        began = time.perf_counter()
        engine.run(plan, lambda layers: None)
        times.append(time.perf_counter() - began)
        driver.give_back([one])
    return statistics.median(times[1:])


def _report(
    context: Context, part: str, what: str, operations: float, seconds: float, peak: float, lasting: float | None
) -> None:
    """Add a row. ``peak``: the GEMM's operations a second; ``lasting``: of GEMMs in a row."""
    reached = operations / seconds
    note = f"{reached / 1e12:.0f} TFLOP/s, share of the GEMM's {reached / peak:.2f}"
    note += f", of GEMMs in a row {reached / lasting:.2f}" if lasting else ""
    context.report.add(part, what, seconds * 1e3, "ms", operations / peak * 1e3, note)


def measure(
    context: Context, part: str, name: str, lengths: tuple[int, ...], chunk_graphs: tuple[int, ...] = (),
    mode: Mode = PLAIN,
) -> None:  # fmt: skip
    """Measure prompts of several lengths of a shape."""
    longest = lengths[-1]
    engine = engine_of(
        context, name, num_blocks=4 * -(-longest // 16), max_num_seqs=4, tokens=longest, max_model_len=longest + 16,
        decode_graphs=(), chunk_graphs=chunk_graphs, mode=mode,
    )  # fmt: skip
    config = context.config(name)
    twice = 2 if mode.fp8 else 1  # the card multiplies float8 twice as fast
    peak, lasting = twice * context.gemm_flops_per_s, twice * context.lasting_gemm_flops_per_s
    for length in lengths:
        driver = Driver(engine)
        what = f"{name}, {length} tokens{', graph' if chunk_graphs else ''}{mode.suffix}"
        operations = flops(config, length)
        seconds = _seconds(engine, driver, config, length, 3 if context.tiny else 8, pause=0)
        _report(context, part, what, operations, seconds, peak, lasting)
        if length >= LONG:
            seconds = _seconds(engine, driver, config, length, 5, pause=0.5)
            _report(context, part, f"{what}, each after a pause", operations, seconds, peak, None)
        if context.device == "gpu" and not chunk_graphs:
            one = sequence([1] * length, "profile")
            plan = driver.plan([(one, length)])
            report_kernels(context, part, what, partial(engine.run, plan, lambda layers: None))
    engine.close()
