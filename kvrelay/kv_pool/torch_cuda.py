"""CUDA by torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.kv_pool.cuda_api import DeviceWords

_DTYPES: dict[type[np.generic], torch.dtype] = {np.int32: torch.int32, np.int64: torch.int64}


class TorchCuda:
    """See CudaApi."""

    errors: tuple[type[Exception], ...] = (RuntimeError, AssertionError)

    def start(self) -> None:
        torch.zeros(1, device="cuda")

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def stream(self) -> Any:
        return torch.cuda.Stream(priority=-1)

    def event(self) -> Any:
        return torch.cuda.Event(blocking=True)

    def on(self, stream: Any) -> AbstractContextManager[object]:
        current: AbstractContextManager[object] = torch.cuda.stream(stream)
        return current

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
        memory: npt.NDArray[Any] = torch.empty(shape, dtype=_DTYPES[dtype], pin_memory=True).numpy()
        return memory

    def tensor(self, memory: DeviceWords) -> Any:
        return torch.as_tensor(memory, device="cuda")
