"""Sampling alone: rows of a large vocabulary, by what is asked for and by tiling."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gpu_check.context import Context
from kvrelay.engine.device.kernels.sampling import SamplingTiling, sample

KINDS: dict[str, tuple[float, float, float, int, int]] = {
    "greedy": (0.0, 1.0, 0.0, 0, -1),
    "temperature": (1.0, 1.0, 0.0, 0, -1),
    "top_p 0.9": (1.0, 0.9, 0.0, 0, -1),
    "top_k 50": (1.0, 1.0, 0.0, 50, -1),
    "top_k 50, top_p 0.9": (1.0, 0.9, 0.0, 50, -1),
    "min_p 0.05": (1.0, 1.0, 0.05, 0, -1),
    "temperature, 5 logprobs": (1.0, 1.0, 0.0, 0, 5),
}
"""Temperature, top_p, min_p, top_k, number of logprobs."""

TILINGS = [SamplingTiling(block, warps) for block in (4096, 8192, 16384) for warps in (8, 16, 32)]


def run(context: Context) -> None:
    """Measure every kind with the engine's tiling, then top_p with others."""
    rows, vocab = (2, 100) if context.tiny else (64, 128256)
    _measure(context, rows, vocab, KINDS, SamplingTiling())
    top_p = {"top_p 0.9": KINDS["top_p 0.9"]}
    for tiling in TILINGS[:1] if context.tiny else TILINGS:
        _measure(context, rows, vocab, top_p, tiling)
    if not context.tiny:
        for others in (1, 256):
            _measure(context, others, vocab, {**top_p, "greedy": KINDS["greedy"]}, SamplingTiling())


def _measure(context: Context, rows: int, vocab: int, kinds: dict[str, Any], tiling: SamplingTiling) -> None:
    device = context.torch_device
    logits = context.random(rows, vocab, dtype="float32", scale=3.0)
    room = torch.empty((rows, tiling.room(vocab)), device=device)
    last = torch.zeros(rows, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    tops = torch.empty((rows, 21), dtype=torch.int32, device=device)
    logprobs = torch.empty((rows, 21), dtype=torch.float32, device=device)
    adjusted = torch.zeros(4, dtype=torch.int32, device=device), torch.zeros((3, 4), device=device)
    masks = torch.zeros((1, vocab // 32 + 1), dtype=torch.int32, device=device)
    limit = logits.nbytes / context.copy_bytes_per_s * 1e6
    for kind, (temperature, top_p, min_p, top_k, num_logprobs) in kinds.items():
        reals = torch.tensor([[0.5], [temperature], [top_p], [min_p]], dtype=torch.float64).repeat(1, rows).to(device)
        reals[0] = torch.rand(rows, dtype=torch.float64, device=device)
        numbers = (
            torch.tensor([[top_k], [num_logprobs], [-1], [0], [0], [-1]], dtype=torch.int32).repeat(1, rows).to(device)
        )
        work = partial(sample, logits, room, reals, numbers, adjusted, masks, last, tokens, tops, logprobs, tiling)
        name = f"{rows} x {vocab}, {kind}, block {tiling.block} warps {tiling.num_warps}"
        try:
            seconds = context.seconds_in_graph([work] * 4, repeats=8)
        except Exception as error:
            context.report.add("sampling", name, f"failed: {repr(error)[:150]}")
            continue
        context.report.add("sampling", name, seconds * 1e6, "us", limit)
