"""Linear layers in float8: kernels and scaled GEMM against references, an engine against bfloat16, and their times."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from golden.cases import CASES
from steps import Shape, operations

from gpu_check import decode, prefill
from gpu_check.context import Context
from gpu_check.driving import PLAIN, Driver, Mode, sequence
from gpu_check.gemm import SHAPES
from gpu_check.golden import engine_of_case
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.operations import Quantized
from kvrelay.engine.device.torch_framework import TorchFramework

BATCHES = (1, 32, 128)

MOST_OTHER = 0.02
"""Share of values that lie between two numbers of float8, by rounding of what is scaled."""

MOST_OF_KV = 0.4
"""Relative distance of keys and values from those of the emulation; a wrong scale or a lost term gives about 1.

A value that lies between two numbers of float8 may be rounded to either: in bfloat16 and in float32 the emulation's
differ by 0.14.
"""


def run(context: Context) -> None:
    """Check, then measure; AssertionError names what is wrong after all has been checked."""
    if not context.framework.has_fp8:
        context.report.add("float8", "not checked", "the card does not multiply float8")
        return
    wrong: list[str] = []
    _check_kernels(context, wrong)
    _check_products(context, wrong)
    _check_engine(context, wrong)
    assert not wrong, wrong
    _measure_products(context)
    decode.measure(context, "float8", "llama3-8b", BATCHES, Mode(fp8=True))
    context.clean_up()
    prefill.measure(context, "float8", "llama3-8b", (40,) if context.tiny else (2048, 8192), mode=Mode(fp8=True))


def _note(context: Context, what: str, distance: float, most: float, wrong: list[str]) -> None:
    context.report.add("float8", what, distance, "relative distance", most)
    if not distance <= most:  # never for NaN
        wrong.append(what)


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def _check_kernels(context: Context, wrong: list[str]) -> None:
    """Compare rows in float8 with what torch's operators make of them: a value that lies between two may be either."""
    dtype = "float32" if context.device == "cpu" else "bfloat16"
    ours, theirs = operations(Shape(dtype=dtype), context.framework)
    for width in (64,) if context.tiny else (1024, 4096, 14336):
        x, due, weight = (context.random(37, width, dtype=dtype) for _ in range(3))
        residuals, gate_up = (x.clone(), x.clone()), context.random(37, 2 * width, dtype=dtype)
        pairs = {
            "quantized": [do.quantized(x) for do in (ours, theirs)],
            "quantized norm": [
                do.quantized_norm(one, due, weight[0], 1e-6) for do, one in zip((ours, theirs), residuals, strict=True)
            ],
            "quantized silu_mul": [do.quantized_silu_mul(gate_up) for do in (ours, theirs)],
        }
        for name, (mine, reference) in pairs.items():
            share = _share_that_differs(mine, reference)
            context.report.add(
                "float8", f"{name} of {width}: values that differ by a step", share, "of all", MOST_OTHER
            )
            if not share <= MOST_OTHER:
                wrong.append(f"{name} of {width}")
        _note(context, f"residual of {width}", _distance(*residuals), 1e-6, wrong)


def _share_that_differs(ours: Quantized, theirs: Quantized) -> float:
    """Return how many of all values are not equal: 1.0 if scales differ, or any value by more than a step."""
    mine, reference = ours.values.float(), theirs.values.float()
    near = (mine - reference).abs() <= torch.clamp(reference.abs() / 8, min=2.0**-9)
    if not near.all() or not torch.allclose(ours.scales, theirs.scales, rtol=1e-5, atol=0):
        return 1.0
    return float((mine != reference).float().mean())


def _wide(rows: Quantized) -> torch.Tensor:
    wide: torch.Tensor = rows.values.float() * rows.scales
    return wide


def _check_products(context: Context, wrong: list[str]) -> None:
    ours, _ = operations(Shape(), context.framework)
    for name, (rows, columns) in {"tiny": (64, 32)}.items() if context.tiny else list(SHAPES.items())[:4]:
        weight = ours.quantized(context.random(rows, columns, dtype="float32", scale=0.02))
        for count in (1, 2, 17, 300):
            x = ours.quantized(context.random(count, columns, dtype="float32"))
            product = context.framework.scaled_linear(x.values, x.scales, weight.values, weight.scales, "bfloat16")
            expected = _wide(x) @ _wide(weight).t()
            _note(context, f"{name}, {count} rows, scaled GEMM", _distance(product, expected), 5e-3, wrong)


def _check_engine(context: Context, wrong: list[str]) -> None:
    """Compare keys and values of a prompt with those of the emulation on the host, and with bfloat16 for the record."""
    tokens = np.random.default_rng(0).integers(0, 256, 40 if context.tiny else 300).tolist()
    host = copy.copy(context)
    host.device, host.torch_device, host.interpreted, host.framework = "cpu", "cpu", False, TorchFramework("cpu", 4)

    def kv(where: Context, mode: Mode) -> torch.Tensor:
        engine = engine_of_case(where, CASES[0], "bfloat16", graphs=True, digests=False, mode=mode)
        one = sequence(tokens, "float8")
        Driver(engine).complete([one], 1, 97)
        found = kv_of(where, engine, list(one.block_table), len(tokens)).cpu()
        engine.close()
        return found

    ours = kv(context, Mode(fp8=True))
    name = f"{CASES[0].name}, keys and values of {len(tokens)} tokens in float8"
    _note(context, f"{name}, from those of the emulation", _distance(ours, kv(host, Mode(fp8=True))), MOST_OF_KV, wrong)
    context.report.add(
        "float8", f"{name}, from those in bfloat16", _distance(ours, kv(context, PLAIN)), "relative distance"
    )


def kv_of(context: Context, engine: DeviceEngine, blocks: Sequence[int], count: int) -> torch.Tensor:
    """Return keys and values of the first ``count`` tokens of a sequence: [layers * 2, count, G, D]."""
    position, size = np.arange(count), engine.geometry.block_size
    index = torch.from_numpy(np.array(blocks)[position // size] * size + position % size).to(context.torch_device)
    return torch.stack([side[index] for layer in engine.launcher.pool.layers for side in layer])


def _measure_products(context: Context) -> None:
    """Measure the scaled GEMM as it is, with fast sums, and beside it what quantizing its rows takes."""
    ours, _ = operations(Shape(dtype="bfloat16"), context.framework)
    for name, (rows, columns) in {"tiny": (64, 32)}.items() if context.tiny else list(SHAPES.items())[:4]:
        copies = 2 if context.tiny else max(2, int(3e8 // (rows * columns)))
        weights = [ours.quantized(context.random(rows, columns, scale=0.02)) for _ in range(copies)]
        for count in (2,) if context.tiny else (1, 16, 32, 128, 2048):
            x = ours.quantized(context.random(count, columns))
            limit = weights[0].values.nbytes / context.copy_bytes_per_s * 1e6
            limit = max(limit, count * rows * columns / context.gemm_flops_per_s * 1e6)
            multiply = context.framework.scaled_linear
            works = [partial(multiply, x.values, x.scales, one.values, one.scales, "bfloat16") for one in weights]
            seconds = context.seconds_in_graph(works, repeats=5)
            note = ""
            if context.device == "gpu":
                fast = [partial(_fast, x, one) for one in weights]
                note = f"with fast sums {context.seconds_in_graph(fast, repeats=5) * 1e6:.1f}"
            context.report.add("float8", f"{name}, {count} rows, scaled GEMM", seconds * 1e6, "us", limit, note)
    for count, width in ((2, 64),) if context.tiny else ((1, 4096), (1, 14336), (2048, 14336)):
        x = context.random(count, 2 * width)
        seconds = context.seconds_in_graph([partial(ours.quantized_silu_mul, x)] * 4, repeats=5)
        limit = (x.nbytes + count * width) / context.copy_bytes_per_s * 1e6
        context.report.add("float8", f"quantized silu_mul of {count} x {width}", seconds * 1e6, "us", limit)


def _fast(x: Quantized, weight: Quantized) -> torch.Tensor:
    result: torch.Tensor = torch._scaled_mm(
        x.values, weight.values.t(), x.scales, weight.scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return result
