"""Every kernel against its reference on the device, on fresh random inputs, with poisoned outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from sampling_checks import check_drafts, check_masks, check_non_finite, check_none_left, check_tokens_and_logprobs
from steps import Case, Shape, copy_of, operations

from gpu_check.context import Context, PoisonedFramework
from kvrelay.engine.device.projections import FrameworkProjections
from kvrelay.engine.device.single_row import SingleRowProjections
from kvrelay.engine.device.weights import Linear
from kvrelay.engine.kernels import HeadNorms

SPANS = [(1500, 1), (0, 1), (700, 1), (15, 1), (0, 300), (21, 5), (1000, 200)]
TINY_SPANS = [(40, 1), (0, 1), (0, 37), (21, 5)]

SHAPES = [
    Shape(32, 8, 128, 16, "bfloat16", 2048),
    Shape(6, 2, 16, 16, "float32", 2048),
    Shape(14, 2, 64, 16, "float16", 2048),
    Shape(16, 16, 96, 32, "bfloat16", 2048),
]
"""Heads, KV heads, their size, tokens of a block, type, longest sequence."""

TOLERANCES = {"float32": 3e-5, "bfloat16": 1e-2, "float16": 2e-3}


def run(context: Context) -> None:
    """Check all of them for several shapes; AssertionError names what is wrong after all have been tried."""
    wrong: list[str] = []
    for shape in [Shape()] if context.tiny else SHAPES:
        _check_layer(context, shape, wrong)
    if context.device == "gpu":
        _check_single_row(context, wrong)
    for vocab_size in (384, 50) if context.tiny else (384, 128256, 151936):
        _check_sampling(context, vocab_size, wrong)
    assert not wrong, wrong


def _check_layer(context: Context, shape: Shape, wrong: list[str]) -> None:
    framework = PoisonedFramework(context.device)
    ours, theirs = operations(shape, framework)
    case = Case(shape, TINY_SPANS if context.tiny else SPANS, ours.tile_rows, device=context.torch_device)
    step, tables, layer = case.build()
    qkv = case.random(step.shape.rows, (shape.heads + 2 * shape.groups) * shape.dim)
    norms = HeadNorms(case.random(shape.dim, seed=3), case.random(shape.dim, seed=4))
    queries = case.random(step.shape.rows, shape.heads, shape.dim, seed=5)
    hidden, weight = case.random(step.shape.rows, 4096, seed=6), case.random(4096, seed=7)
    rows = torch.tensor([3, 8, 3], dtype=torch.int32, device=context.torch_device)
    pools = copy_of(layer), copy_of(layer)

    def compare(what: str, mine: torch.Tensor, reference: torch.Tensor) -> None:
        distance = float((mine.double() - reference.double()).norm() / reference.double().norm())
        good = distance <= TOLERANCES[shape.dtype]  # never for NaN
        name = f"{what}, {shape.dtype}, {shape.heads}/{shape.groups} heads of {shape.dim}"
        context.report.add("kernels", name, distance, "relative distance", TOLERANCES[shape.dtype])
        if not good:
            wrong.append(name)

    compare("rms_norm", ours.rms_norm(hidden, weight, 1e-6), theirs.rms_norm(hidden, weight, 1e-6))
    compare("rms_norm of rows", ours.rms_norm(hidden, weight, 1e-6, rows), theirs.rms_norm(hidden, weight, 1e-6, rows))
    compare("silu_mul", ours.silu_mul(hidden), theirs.silu_mul(hidden))
    turned = [
        do.apply_rope_and_write_kv(qkv, norms, 1e-6, step, pool) for do, pool in zip((ours, theirs), pools, strict=True)
    ]
    compare("rope", *turned)
    compare("keys", pools[0].keys, pools[1].keys)
    compare("values", pools[0].values, pools[1].values)
    for window in (None, 100):
        attended = [do.attention(queries, layer, step, tables, window) for do in (ours, theirs)]
        singles = step.shape.decodes
        compare(f"decode attention, window {window}", attended[0][:singles], attended[1][:singles])
        compare(f"prefill attention, window {window}", attended[0][singles:], attended[1][singles:])
    broken = hidden.clone()
    broken[1, 7], broken[3, 0], broken[4, 4095] = float("nan"), float("inf"), float("-inf")
    compare("broken rows", ours.broken_rows(broken), theirs.broken_rows(broken))
    if ours.room is not None:
        _check_gathered(context, shape, compare)


def _check_gathered(context: Context, shape: Shape, compare: Callable[[str, torch.Tensor, torch.Tensor], None]) -> None:
    """Compare attention over gathered contexts, in memory that held NaN, of chunks that begin anywhere."""
    ours, theirs = operations(shape, PoisonedFramework(context.device))
    room = ours.room._replace(fewest=30)
    for spans in [[(1500, 1), (0, 300), (21, 5), (63, 65), (1000, 200)], [(0, 1999)]]:
        case = Case(shape, [(40, 1), (0, 37)] if context.tiny else spans, ours.tile_rows, device=context.torch_device)
        step, tables, layer = replace(case, room=room).build()
        queries = case.random(step.shape.rows, shape.heads, shape.dim, seed=5)
        expected = theirs.attention(queries, layer, case.build()[0], tables, None)
        compare("attention over gathered contexts", ours.attention(queries, layer, step, tables, None), expected)


def _check_single_row(context: Context, wrong: list[str]) -> None:
    """Compare products of a single row, with norm, SiLU and residual, with one operator after the other."""
    framework = PoisonedFramework(context.device)
    ours, theirs = operations(Shape(dtype="bfloat16"), framework)
    both = SingleRowProjections(framework, ours, 1e-5, "bfloat16"), FrameworkProjections(framework, theirs, 1e-5)
    for hidden, ffn in ((4096, 14336), (1024, 3072), (896, 4864)):
        names = {"qkv": (hidden * 3 // 2, hidden), "out": (hidden, hidden), "gate_up": (2 * ffn, hidden)}
        sizes = {**names, "down": (hidden, ffn)}
        qkv, out, gate_up, down = (
            Linear(context.random(*size, scale=0.02), context.random(size[0])) for size in sizes.values()
        )
        residuals, norm, x = [context.random(1, hidden)] * 2, context.random(hidden), context.random(1, hidden)
        results = []
        for project, residual in zip(both, [one.clone() for one in residuals], strict=True):
            normed = project.normed(residual, None, norm, qkv)
            project.add(residual, x, out)
            added = residual.clone()
            project.feed_forward(residual, None, norm, gate_up, down)
            results.append((normed, added, residual))
        for name, mine, reference in zip(("qkv", "out", "MLP"), *results, strict=True):
            distance = float((mine.double() - reference.double()).norm() / reference.double().norm())
            what = f"single row, {name}, hidden size {hidden}"
            context.report.add("kernels", what, distance, "relative distance", TOLERANCES["bfloat16"])
            if not distance <= TOLERANCES["bfloat16"]:
                wrong.append(what)


def _check_sampling(context: Context, vocab_size: int, wrong: list[str]) -> None:
    ours, _ = operations(Shape(), PoisonedFramework(context.device))
    checks: list[tuple[str, Callable[[], None]]] = [
        ("tokens and logprobs", lambda: check_tokens_and_logprobs(ours, vocab_size, vocab_size, context.device)),
        ("drafts", lambda: check_drafts(ours, vocab_size, context.device)),
        ("masks", lambda: check_masks(ours, vocab_size, context.device)),
        ("not finite", lambda: check_non_finite(ours, context.device)),
        ("no token left", lambda: check_none_left(ours, context.device)),
    ]
    for what, check in checks:
        name, result = f"sampling, {what}, vocabulary of {vocab_size}", "equal to the host's"
        try:
            check()
        except AssertionError as error:
            wrong.append(name)
            result = f"DIFFERENT: {str(error)[:200]}"
        context.report.add("kernels", name, result)
