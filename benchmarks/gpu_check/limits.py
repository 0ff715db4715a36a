"""What the card can do: bytes and operations a second, which the other parts compare with."""

from __future__ import annotations

import torch

from gpu_check.context import Context


def run(context: Context) -> None:
    """Measure a large copy, a large read and a large GEMM."""
    count = 1 << (12 if context.tiny else 30)
    source = context.random(count, dtype="float32")
    target = torch.empty_like(source)
    seconds = context.seconds(lambda: target.copy_(source), repeats=10)
    context.copy_bytes_per_s = 2 * source.nbytes / seconds
    context.report.add("limits", "copy, read and written", context.copy_bytes_per_s / 1e12, "TB/s")
    seconds = context.seconds(lambda: torch.amax(source), repeats=10)
    context.report.add("limits", "read", source.nbytes / seconds / 1e12, "TB/s")
    size = 64 if context.tiny else 8192
    first, second = context.random(size, size), context.random(size, size)
    seconds = context.seconds(lambda: torch.mm(first, second), repeats=20)
    context.gemm_flops_per_s = 2 * size**3 / seconds
    context.report.add("limits", f"bf16 GEMM of {size}", context.gemm_flops_per_s / 1e12, "TFLOP/s")
    seconds = context.seconds(lambda: torch.mm(first, second), repeats=300, warm_up=3 if context.tiny else 400)
    context.lasting_gemm_flops_per_s = 2 * size**3 / seconds
    what = f"bf16 GEMM of {size} after 0.6 s of them: the card keeps to its power"
    context.report.add("limits", what, context.lasting_gemm_flops_per_s / 1e12, "TFLOP/s")
