"""Causal attention for training: ``attention.cpp``, built when first needed, as an operator of PyTorch."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("attention.cpp")
# Not -ffast-math: a library linked with it makes the process that loads it flush subnormal numbers to zero.
_FAST_MATH = (
    "-fno-math-errno",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fassociative-math",
    "-freciprocal-math",
    "-ffinite-math-only",
)
_COMPILE = ("g++", "-O3", "-march=native", *_FAST_MATH, "-funroll-loops", "-shared", "-fPIC")


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.so"
        subprocess.run([*_COMPILE, str(_SOURCE), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


@torch.library.custom_op("demo_model::attend", mutates_args=())  # type: ignore[untyped-decorator]
def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What queries see of values, and the logsumexp of their scores.

    All are float32; q, k, v and the first result [batch, heads, length, 32], the second [batch, heads, length].
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, heads, length, _ = q.shape
    mixed, logsumexp = torch.empty_like(q), torch.empty(batch, heads, length)
    _library().forward(*_pointers(q, k, v, mixed, logsumexp), batch * heads, length)
    return mixed, logsumexp


@torch.library.custom_op("demo_model::attend_backward", mutates_args=())  # type: ignore[untyped-decorator]
def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, logsumexp: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of ``mixed``."""
    batch, heads, length, _ = q.shape
    inputs = [tensor.contiguous() for tensor in (q, k, v, mixed, logsumexp, gradient)]
    d_q, d_k, d_v = (torch.empty_like(inputs[0]) for _ in range(3))
    _library().backward(*_pointers(*inputs, d_q, d_k, d_v), batch * heads, length)
    return d_q, d_k, d_v


@attend.register_fake  # type: ignore[untyped-decorator]
def _shapes(q: Tensor, _k: Tensor, _v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3])


@attend_backward.register_fake  # type: ignore[untyped-decorator]
def _backward_shapes(q: Tensor, *_others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = attend_backward(*ctx.saved_tensors, gradient)
    return found


attend.register_autograd(_backward, setup_context=_keep)
