"""What a pool on a GPU needs of the framework by which this process uses CUDA: ``torch_cuda`` or ``paddle_cuda``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class DeviceWords:
    """``count`` words of device memory, as frameworks take them up."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (count,), "typestr": "<i8", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


class CudaApi(Protocol):
    """CUDA by one framework. Triton launches kernels with the same framework, in its current stream.

    Streams have ``wait_event(event)`` and ``synchronize()``; events have ``record(stream)``, ``query()`` and
    ``synchronize()``, which waits without using a CPU. ``errors``: what all of it raises for errors of the device.
    """

    errors: tuple[type[Exception], ...]

    def start(self) -> None:
        """Make the device's context the current one of this thread."""

    def release_memory(self) -> None:
        """Give memory that is kept for reuse back to the device."""

    def stream(self) -> Any:
        """Return a new stream of high priority."""

    def event(self) -> Any:
        """Return a new event."""

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """Return a context in which ``stream`` is the current one."""

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
        """Return host memory with undefined content that the device reaches at the same address."""

    def tensor(self, memory: DeviceWords) -> Any:
        """Return device memory as the framework's tensor, int64 [count]."""
