"""Compiling the kernels of all parts in several processes at once, so that the parts find them in Triton's cache.

A kernel is compiled for the types and sizes it is launched with. Here it is launched on small tensors of the host and
only compiled. What is not foreseen here is compiled when a part needs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

PROCESSES = 12
MOST_SECONDS = 60


def precompile(report: Any) -> None:
    """Compile everything; says how long it took and how much failed."""
    began = time.monotonic()
    count = min(PROCESSES, os.cpu_count() or 1)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "gpu_check.precompile", str(count)]
    workers = [
        subprocess.Popen([*command, str(index)], env=environment, stdout=subprocess.PIPE, text=True)
        for index in range(count)
    ]
    lines: list[str] = []
    for worker in workers:
        try:
            output, _ = worker.communicate(timeout=max(1.0, MOST_SECONDS + began - time.monotonic()))
            lines += output.splitlines()
        except subprocess.TimeoutExpired:
            worker.kill()
    for line in lines:
        if "failed" in line:
            print(f"# {line[:300]}", flush=True)
    compiled = sum(line.startswith("compiled") for line in lines)
    report.fact(
        "precompiled", f"{compiled} of {len(lines)} jobs in {time.monotonic() - began:.0f} s, {count} processes"
    )


class Model(NamedTuple):
    """What its kernels are compiled for."""

    shape: Any
    hidden: int
    ffn: int
    vocab: int
    windows: tuple[int | None, ...]
    normed: bool


def _jobs() -> list[Callable[[], object]]:
    """Return launches in an order in which neighbours take about as long."""
    from steps import Shape  # noqa: PLC0415

    from gpu_check.attention import DECODE_TILINGS, DENSE_TILINGS, PREFILL_TILINGS  # noqa: PLC0415
    from gpu_check.kernels import SHAPES  # noqa: PLC0415
    from gpu_check.sampling import TILINGS  # noqa: PLC0415

    eight = Shape(32, 8, 128, 16, "bfloat16")
    models = [Model(shape, 4096, 2048, 384, (None, 100), True) for shape in SHAPES]
    models += [
        Model(eight, 4096, 14336, 128256, (None,), False),
        Model(Shape(16, 8, 128, 16, "bfloat16"), 1024, 3072, 151936, (None,), True),
        Model(eight, 4096, 12288, 151936, (None,), True),
        Model(Shape(6, 2, 16, 16, "float32"), 96, 192, 384, (None, 100, 24), True),
        Model(Shape(6, 2, 16, 16, "float32"), 96, 192, 384, (), False),
        Model(Shape(6, 3, 16, 16, "float32"), 96, 192, 384, (None, 33), True),
        Model(Shape(6, 2, 16, 16, "bfloat16"), 96, 192, 384, (None,), False),
    ]
    jobs: list[Callable[[], object]] = []
    for model in models:
        jobs += [partial(_attention, model, window) for window in model.windows]
        jobs.append(partial(_others, model))
        jobs.append(partial(_sampling, model.vocab, None))
    jobs += [partial(_prefill, eight, tiling) for tiling in PREFILL_TILINGS]
    jobs += [partial(_dense, eight, tiling) for tiling in DENSE_TILINGS]
    small = [model.shape for model in models if model.shape.dtype != "float32" and model.shape.dim != 96]
    jobs += [partial(_dense, shape, DENSE_TILINGS[0]) for shape in small]
    jobs += [partial(_decode, eight, tiling) for tiling in DECODE_TILINGS]
    jobs += [partial(_sampling, 128256, tiling) for tiling in TILINGS]
    jobs += [partial(_float8, width) for width in (96, 192, 1024, 4096, 14336)]
    jobs += _deterministic_jobs()
    jobs += [
        partial(_single_row, hidden, ffn, biased)
        for hidden, ffn in ((4096, 14336), (4096, 12288), (1024, 3072), (896, 4864))
        for biased in (False, True)
    ]
    return jobs


def _single_row(hidden: int, ffn: int, biased: bool) -> None:
    import torch  # noqa: PLC0415

    from kvrelay.engine.device.single_row import SingleRowProjections  # noqa: PLC0415
    from kvrelay.engine.device.torch_framework import TorchFramework  # noqa: PLC0415
    from kvrelay.engine.device.weights import Linear  # noqa: PLC0415

    make = partial(torch.empty, dtype=torch.bfloat16)

    def linear(rows: int, columns: int) -> Linear:
        return Linear(make(rows, columns), make(rows) if biased else None)

    project = SingleRowProjections(TorchFramework("cpu"), None, 1e-5, "bfloat16")  # type: ignore[arg-type]
    residual, norm = make(1, hidden), make(hidden)
    for width in (hidden * 3 // 2, 2 * hidden, 4 * hidden):
        project.normed(residual, None, norm, linear(width, hidden))
    for width in (hidden, 2 * hidden):
        project.add(residual, make(1, width), linear(hidden, width))
    project.feed_forward(residual, None, norm, linear(2 * ffn, hidden), linear(hidden, ffn))


def _deterministic_jobs() -> list[Callable[[], object]]:
    """Return the launches of the deterministic mode's kernels: attention, and products of few rows and of many."""
    from steps import Shape  # noqa: PLC0415

    from gpu_check.deterministic import HEADS  # noqa: PLC0415
    from gpu_check.gemm import SHAPES as WEIGHTS  # noqa: PLC0415

    jobs: list[Callable[[], object]] = [
        partial(_invariant_attention, shape, window) for shape in HEADS for window in (None, 100)
    ]
    jobs += [
        partial(_invariant_attention, shape, None)
        for shape in (Shape(16, 8, 128, 16, "bfloat16", 4096), Shape(6, 2, 16, 16, "float32", 2048))
    ]
    small = {"qkv": (4096, 1024), "out": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}
    small["lm_head"] = (151936, 1024)
    for weights, is_checked in ((WEIGHTS, True), (small, False)):
        for name, (rows, columns) in weights.items():
            for count in (1, 300):
                jobs.append(partial(_invariant_gemm, name, count, rows, columns, False))
                if is_checked:
                    jobs.append(partial(_invariant_gemm, name, count, rows, columns, True))
    golden = {"qkv": (160, 96), "out": (96, 96), "gate_up": (384, 96), "down": (96, 192), "lm_head": (384, 96)}
    jobs += [partial(_invariant_gemm, name, 1, *sizes, False, "float32") for name, sizes in golden.items()]
    return jobs


def _operations(model_shape: Any) -> tuple[Any, Any, Any, Any]:
    """Return Triton's operations, a step of one single token and one tile, block tables, and a layer."""
    from steps import Case, operations  # noqa: PLC0415

    ours, _ = operations(model_shape)
    step, tables, layer = Case(model_shape, [(3, 1), (0, 2)], ours.tile_rows).build()
    return ours, step, tables, layer


def _attention(model: Model, window: int | None) -> None:
    ours, step, tables, layer = _operations(model.shape)
    queries = layer.keys.new_empty((step.shape.rows, model.shape.heads, model.shape.dim))
    for most in sorted(most for most, _ in ours.decode_tilings):
        ours._limits = model.shape.limits(most if most < 1 << 20 else 65)
        ours.attention(queries[:, :, :], layer, step, tables, window)
        ours.decode_tilings = tuple(tiling for tiling in ours.decode_tilings if tiling[0] != most)


def _others(model: Model) -> None:
    import torch  # noqa: PLC0415

    from kvrelay.engine.kernels import HeadNorms  # noqa: PLC0415

    ours, step, _, layer = _operations(model.shape)
    shape, make = model.shape, layer.keys.new_empty
    rows = torch.zeros(4, dtype=torch.int32)
    ours.embed(step, torch.zeros(8, dtype=torch.int32), make((50, model.hidden)))
    ours.rms_norm(make((4, model.hidden)), make(model.hidden), 1e-6)
    ours.rms_norm(make((4, model.hidden)), make(model.hidden), 1e-6, rows)
    ours.broken_rows(make((4, model.hidden)))
    ours.silu_mul(make((4, 2 * model.ffn)))
    norms = HeadNorms(make(shape.dim), make(shape.dim)) if model.normed else None
    qkv = make((step.shape.rows, (shape.heads + 2 * shape.groups) * shape.dim))
    ours.apply_rope_and_write_kv(qkv, norms, 1e-6, step, layer)
    ours.set_entries(torch.zeros((8, 16), dtype=torch.int32), torch.zeros((2, 8), dtype=torch.int32))
    _moving(shape.block_size * shape.groups * shape.dim * layer.keys.element_size() // 8)


def _moving(num_words: int) -> None:
    import torch  # noqa: PLC0415

    from kvrelay.kv_pool.copy_kernel import Place, move_blocks  # noqa: PLC0415

    place = Place(torch.zeros(8).data_ptr(), 8, 0, torch.zeros(8).data_ptr())  # only compiled: nothing is read
    for target in (place, None):
        move_blocks(place, target, torch.zeros(8).data_ptr(), 2, 2, num_words)


def _sampling(vocab: int, tiling: Any) -> None:
    import torch  # noqa: PLC0415

    from kvrelay.engine.device.kernels.sampling import SamplingTiling, sample  # noqa: PLC0415

    logits = torch.empty((4, vocab))
    reals, numbers = torch.zeros((4, 8), dtype=torch.float64), torch.zeros((6, 8), dtype=torch.int32)
    entries = torch.zeros(16, dtype=torch.int32), torch.zeros((3, 16))
    ints, tops = torch.zeros(16, dtype=torch.int32), torch.zeros((4, 21), dtype=torch.int32)
    sample(
        logits,
        logits.new_empty(16),
        reals,
        numbers,
        entries,
        torch.zeros((1, vocab // 32 + 1), dtype=torch.int32),
        ints,
        ints,
        tops,
        torch.zeros((4, 21)),
        tiling or SamplingTiling(),
    )


def _prefill(shape: Any, tiling: Any) -> None:
    from kvrelay.engine.device.kernels.prefill_attention import prefill_attention  # noqa: PLC0415

    _, step, tables, layer = _operations(shape)
    queries = layer.keys.new_empty((16, shape.heads, shape.dim))
    prefill_attention(
        queries, layer.keys, layer.values, step.tiles, tables, queries, shape.block_size, None, False, tiling
    )


def _dense(shape: Any, tiling: Any) -> None:
    import torch  # noqa: PLC0415

    from kvrelay.engine.device.kernels.dense_attention import dense_attention, gather  # noqa: PLC0415

    _, step, tables, layer = _operations(shape)
    queries = layer.keys.new_empty((128, shape.heads, shape.dim))
    room = layer.keys.new_empty((2, 128, shape.groups, shape.dim))
    pieces = torch.zeros((3, 2), dtype=torch.int32)
    dense_attention(queries, (room[0], room[1]), step.tiles, queries, tiling)
    gather(layer.keys, layer.values, pieces, tables, (room[0], room[1]), shape.block_size, tiling.tile)


def _decode(shape: Any, tiling: Any) -> None:
    import torch  # noqa: PLC0415

    from kvrelay.engine.device.kernels.decode_attention import decode_attention, scratch_sizes  # noqa: PLC0415

    _, step, tables, layer = _operations(shape)
    queries = layer.keys.new_empty((1, shape.heads, shape.dim))
    sizes = scratch_sizes(1, shape.heads, shape.groups, shape.dim, tiling.splits)
    scratch = torch.zeros(sizes[0]), torch.zeros(sizes[1]), torch.zeros(sizes[2], dtype=torch.int32)
    decode_attention(
        queries,
        layer.keys,
        layer.values,
        step.positions,
        step.table_rows,
        tables,
        queries,
        scratch,
        shape.block_size,
        None,
        False,
        tiling,
    )


def _float8(width: int) -> None:
    import torch  # noqa: PLC0415
    from steps import Shape, operations  # noqa: PLC0415

    ours, _ = operations(Shape(dtype="bfloat16"))
    make = partial(torch.empty, dtype=torch.bfloat16)
    x, weight = make(4, width), make(width)
    ours.quantized(x)
    ours.quantized_norm(x, None, weight, 1e-6)
    ours.quantized_norm(x, x, weight, 1e-6)
    ours.quantized_silu_mul(make(4, 2 * width))


def _invariant_attention(shape: Any, window: int | None) -> None:
    from steps import Case  # noqa: PLC0415

    from kvrelay.engine.device.invariant import MOST_SPREAD, InvariantOperations  # noqa: PLC0415
    from kvrelay.engine.device.torch_framework import TorchFramework  # noqa: PLC0415

    ours = InvariantOperations(TorchFramework("cpu"), shape.head_shape(), shape.limits(1))
    for singles in (1, MOST_SPREAD + 1):
        step, tables, layer = Case(shape, [(3, 1)] * singles + [(0, 2)], ours.tile_rows).build()
        queries = layer.keys.new_empty((step.shape.rows, shape.heads, shape.dim))
        ours.attention(queries, layer, step, tables, window)


def _invariant_gemm(name: str, count: int, rows: int, columns: int, checked: bool, dtype: str = "bfloat16") -> None:
    """Compile a product as the engine launches it, or as the check of its bits does: biased, in float32."""
    import torch  # noqa: PLC0415

    from kvrelay.engine.device.invariant import InvariantProjections  # noqa: PLC0415
    from kvrelay.engine.device.torch_framework import TorchFramework  # noqa: PLC0415
    from kvrelay.engine.device.weights import Linear  # noqa: PLC0415

    project = InvariantProjections(TorchFramework("cpu"), None, 1e-6, dtype)  # type: ignore[arg-type]
    make = partial(torch.empty, dtype=getattr(torch, dtype))
    linear = Linear(make(rows, columns), make(rows) if checked else None)
    x = make(count, columns)
    project._product(x, linear, "float32" if checked or name == "lm_head" else dtype)
    if checked:
        project.add(torch.empty(count, rows), x, linear)
    if name in ("out", "down"):
        project.add(make(count, rows), x, linear._replace(bias=None))


def main() -> None:
    """Do this process's share of the jobs: every so many, from an index on."""
    from compiling import compiled_only  # noqa: PLC0415

    count, index = (int(argument) for argument in sys.argv[1:3])
    with compiled_only():
        for job in _jobs()[index::count]:
            began = time.monotonic()
            try:
                job()
                print(f"compiled {getattr(job, 'args', job)} in {time.monotonic() - began:.1f} s", flush=True)
            except Exception as error:
                print(f"failed {getattr(job, 'args', job)}: {error!r}", flush=True)


if __name__ == "__main__":
    main()
