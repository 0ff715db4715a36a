"""Which kernels and which type a node computes with: what its config asks for and the machine has."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

from kvrelay.core.config import NodeConfig
from kvrelay.core.errors import CheckpointError, ConfigError
from kvrelay.engine.kernels import HeadShape, Kernels, KernelsUnavailableError
from kvrelay.engine.native.library import NativeLibrary
from kvrelay.engine.native_kernels import NativeKernels
from kvrelay.engine.onednn import OneDNN
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.portable import PortableKernels

logger = logging.getLogger(__name__)


def choose_kernels(node: NodeConfig, stored_dtype: str, shape: HeadShape) -> Kernels:
    """Return the kernels for ``node`` and a checkpoint in ``stored_dtype``, and log which and why.

    Raises ConfigError if it asks for kernels that are not there, CheckpointError if for a type they do not compute in.
    """
    if node.engine.device == "gpu":
        return _portable(node, shape, "bfloat16" if node.model.dtype == "auto" else node.model.dtype, "on a GPU")
    if node.engine.kernels == "portable":
        return _portable(node, shape, _portable_dtype(node), "engine.kernels asks for them")
    try:
        onednn, library = open_native()
    except KernelsUnavailableError as error:
        if node.engine.kernels == "native":
            raise ConfigError([f"engine.kernels: native is not to be had here: {error}"]) from error
        return _portable(node, shape, _portable_dtype(node), str(error))
    dtype = _native_dtype(node, stored_dtype, onednn)
    kernels = NativeKernels(dtype, shape, node.cache.block_size, onednn, library, node.threads)
    logger.info(
        "kernels: native in %s (oneDNN %s for %s, own code for %s), %d threads",
        *(dtype, onednn.version, onednn.isa, library.isa, node.threads),
    )
    return kernels


def _portable(node: NodeConfig, shape: HeadShape, dtype: str, reason: str) -> PortableKernels:
    _check_cache_dtype(node, dtype)
    logger.info("kernels: portable in %s (%s)", dtype, reason)
    return PortableKernels(dtype, shape)


def _portable_dtype(node: NodeConfig) -> str:
    if node.model.dtype not in ("auto", "float32"):
        raise CheckpointError(
            f"model.dtype {node.model.dtype}: the portable kernels compute in float32 on a CPU, because Paddle "
            "multiplies no other type there; use auto or float32 (checkpoints of any of the three types are read)"
        )
    return "float32"


def _native_dtype(node: NodeConfig, stored_dtype: str, onednn: OneDNN) -> str:
    """Return the type to compute in: by itself bfloat16 only for a checkpoint of that type on a CPU made for it."""
    wanted = node.model.dtype
    if wanted == "auto":
        wanted = "bfloat16" if stored_dtype == "bfloat16" and onednn.multiplies("bfloat16") else "float32"
    if wanted == "float16":
        raise CheckpointError("model.dtype float16: on a CPU kvrelay computes in bfloat16 or float32; use one of them")
    if wanted == "bfloat16" and not onednn.multiplies("bfloat16"):
        raise CheckpointError(
            f"model.dtype bfloat16: this CPU ({onednn.isa}) has no fast bfloat16; use auto or float32"
        )
    _check_cache_dtype(node, wanted)
    return wanted


def _check_cache_dtype(node: NodeConfig, dtype: str) -> None:
    if node.cache.dtype not in ("auto", dtype):
        raise CheckpointError(
            f"cache.dtype {node.cache.dtype}: the KV cache is of the type of compute, {dtype}; use auto or {dtype}"
        )


def multiplies_bfloat16() -> bool:
    """Return whether native kernels are to be had here, on a CPU that is made for bfloat16."""
    try:
        onednn, _ = open_native()
    except KernelsUnavailableError:
        return False
    return onednn.multiplies("bfloat16")


def open_native() -> tuple[OneDNN, NativeLibrary]:
    """Return what native kernels are made of. Raises KernelsUnavailableError if some of it is not there.

    Our own library runs on the OpenMP that oneDNN got: Paddle's wheel brings one, the system another, and what comes
    first in the scope of Paddle's own library is taken.
    """
    onednn = OneDNN(Path(paddle.__file__).parent / "libs" / "libdnnl.so.3")
    return onednn, NativeLibrary(ctypes.CDLL(paddle.base.core.__file__))
