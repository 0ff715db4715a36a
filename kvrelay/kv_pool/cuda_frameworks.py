"""The frameworks by which a process uses CUDA. Only the one that is asked for is imported."""

from __future__ import annotations

from typing import Literal

from kvrelay.kv_pool.cuda_api import CudaApi


def cuda_api(framework: Literal["torch", "paddle"]) -> CudaApi:
    """Return CUDA by ``framework``. Call before Triton is imported."""
    if framework == "torch":
        from kvrelay.kv_pool.torch_cuda import TorchCuda  # noqa: PLC0415

        return TorchCuda()
    from kvrelay.kv_pool.paddle_cuda import PaddleCuda  # noqa: PLC0415

    return PaddleCuda()
