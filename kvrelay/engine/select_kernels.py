"""Selects the kernels and the type that a node computes with, from its config and the machine."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.engine.gemm_kernels import GemmKernels
from kvrelay.engine.int8 import Quantization
from kvrelay.engine.kernels import HeadShape, Kernels
from kvrelay.engine.native.library import GemmKind, NativeLibrary
from kvrelay.engine.native_kernels import NativeKernels
from kvrelay.engine.onednn import OneDNN
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.portable import PortableKernels
from kvrelay.errors import CheckpointError, ConfigError, KernelsUnavailableError

logger = logging.getLogger(__name__)


def choose_kernels(node: NodeConfig, stored_dtype: str, shape: HeadShape) -> Kernels:
    """Return the kernels for ``node`` and a checkpoint in ``stored_dtype``, and log which were selected and why.

    Raises ConfigError if the requested kernels are unavailable, CheckpointError if they do not support the type.
    """
    if node.engine.device == "gpu":
        return _portable(node, shape, "bfloat16" if node.model.dtype == "auto" else node.model.dtype, "on a GPU")
    if node.engine.kernels == "portable":
        return _portable(node, shape, _portable_dtype(node), "as engine.kernels says")
    try:
        onednn = open_onednn()
    except KernelsUnavailableError as error:
        return _without(node, shape, error)
    dtype = _native_dtype(node, stored_dtype, onednn)
    try:
        library = open_library()
    except KernelsUnavailableError as error:
        return _without_library(node, shape, dtype, onednn, error)
    _check_cache_dtype(node, dtype)
    quantization = Quantization(node.engine.quantization)
    _check_gemm(library, quantization, dtype)
    logger.info(
        "kernels: native in %s%s (oneDNN %s for %s, own code for %s), %d threads",
        *(dtype, _with(quantization), onednn.version, onednn.isa, library.isa, node.threads),
    )
    return NativeKernels(dtype, shape, node.cache.block_size, onednn, library, node.threads, quantization)


def _without(node: NodeConfig, shape: HeadShape, error: KernelsUnavailableError) -> Kernels:
    _refuse_if_asked_for(node, error)
    return _portable(node, shape, _portable_dtype(node), str(error))


def _without_library(
    node: NodeConfig, shape: HeadShape, dtype: str, onednn: OneDNN, error: KernelsUnavailableError
) -> Kernels:
    _refuse_if_asked_for(node, error)
    _check_cache_dtype(node, "float32")
    quantization = Quantization(node.engine.quantization)
    logger.info(
        "kernels: oneDNN %s for GEMMs in %s%s, portable for all else in float32 (%s)",
        *(onednn.version, dtype, _with(quantization), error),
    )
    return GemmKernels(dtype, shape, onednn, quantization)


def _refuse_if_asked_for(node: NodeConfig, error: KernelsUnavailableError) -> None:
    if node.engine.kernels == "native":
        raise ConfigError([f"engine.kernels: native kernels unavailable: {error}"]) from error


def _portable(node: NodeConfig, shape: HeadShape, dtype: str, reason: str) -> PortableKernels:
    _check_cache_dtype(node, dtype)
    quantization = Quantization(node.engine.quantization)
    logger.info("kernels: portable in %s%s (%s)", dtype, _with(quantization), reason)
    return PortableKernels(dtype, shape, quantization)


def _with(quantization: Quantization) -> str:
    return "" if quantization is Quantization.NONE else f" with weights in int8, {quantization}"


def _portable_dtype(node: NodeConfig) -> str:
    if node.model.dtype not in ("auto", "float32"):
        raise CheckpointError(
            f"model.dtype {node.model.dtype}: the portable kernels compute in float32 on a CPU, because Paddle "
            "has no other GEMM there; use auto or float32 (checkpoints of all three types can be read)"
        )
    return "float32"


def _native_dtype(node: NodeConfig, stored_dtype: str, onednn: OneDNN) -> str:
    """Return the type to compute in. By default: bfloat16 for a bfloat16 checkpoint on a CPU with fast bfloat16."""
    wanted = node.model.dtype
    if wanted == "auto":
        wanted = "bfloat16" if stored_dtype == "bfloat16" and onednn.supports_dtype("bfloat16") else "float32"
    if wanted == "float16":
        raise CheckpointError("model.dtype float16: on a CPU kvrelay computes in bfloat16 or float32; use one of them")
    if wanted == "bfloat16" and not onednn.supports_dtype("bfloat16"):
        raise CheckpointError(
            f"model.dtype bfloat16: this CPU ({onednn.isa}) has no fast bfloat16; use auto or float32"
        )
    return wanted


def _check_cache_dtype(node: NodeConfig, dtype: str) -> None:
    if node.cache.dtype not in ("auto", dtype):
        raise CheckpointError(
            f"cache.dtype {node.cache.dtype}: the KV cache is of the type of compute, {dtype}; use auto or {dtype}"
        )


def _check_gemm(library: NativeLibrary, quantization: Quantization, dtype: str) -> None:
    wanted = quantization is Quantization.W8A16 and dtype == "bfloat16"
    if wanted and not library.supports(GemmKind.HALVES_BY_INT8):
        raise ConfigError(
            [f"engine.quantization: w8a16 in bfloat16 is unavailable with {library.isa}; set model.dtype to float32"]
        )


def has_native_bfloat16() -> bool:
    """Return whether all native kernels are available here, on a CPU with bfloat16 instructions."""
    try:
        open_library()
        return open_onednn().supports_dtype("bfloat16")
    except KernelsUnavailableError:
        return False


def open_onednn() -> OneDNN:
    """Return oneDNN. Raises KernelsUnavailableError if Paddle's wheel does not contain it."""
    return OneDNN(Path(paddle.__file__).parent / "libs" / "libdnnl.so.3")


def open_library() -> NativeLibrary:
    """Return our own library. Raises KernelsUnavailableError if it was not compiled.

    It uses the same OpenMP as oneDNN. Paddle's wheel contains one and the system may have another. The one that is
    found first in the scope of Paddle's library is used.
    """
    return NativeLibrary(ctypes.CDLL(paddle.base.core.__file__))
