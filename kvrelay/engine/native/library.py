"""Loads the compiled library of this folder and declares its C interface (see ``library.cpp``)."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path

from kvrelay.errors import KernelsUnavailableError

_INTERFACE_VERSION = 5

_Pointer, _Int64 = ctypes.c_void_p, ctypes.c_int64

COLUMNS = 64
"""Columns of a panel of weights."""

STEP_BYTES = 4 * COLUMNS
"""Bytes of a panel for one step along a row: one float32, two bfloat16 or four int8 per column."""

INT8_SLAB, WIDENED_SLAB = 256, 64
"""Steps per slab of a panel: one that stays in cache, and one that fits the scratch memory when widened."""


OWN_CHUNK = 512
"""Elements per partial sum where all GEMMs are our own; a slab of them fits the scratch memory when widened."""


class GemmKind(IntEnum):
    """``KvrGemm.kind`` of ``kernels.h``."""

    FLOATS, HALVES, FLOATS_BY_INT8, HALVES_BY_INT8, INT8, FLOATS_BY_HALVES = range(6)


class AttentionCall(ctypes.Structure):
    """``KvrAttention`` of ``kernels.h``."""

    _fields_ = (
        *((name, _Pointer) for name in ("queries", "keys", "values", "out", "sequences")),
        *(
            (name, _Int64)
            for name in ("num_sequences", "num_heads", "num_kv_heads", "head_dim", "block_size", "window")
        ),
        ("scale", ctypes.c_float),
        ("bf16", ctypes.c_int32),
    )


class HeadsCall(ctypes.Structure):
    """``KvrHeads`` of ``kernels.h``."""

    _fields_ = (
        *((name, _Pointer) for name in ("qkv", "q_norm", "k_norm", "cosine", "sine", "positions", "slots")),
        *((name, _Pointer) for name in ("queries", "keys", "values")),
        *((name, _Int64) for name in ("num_rows", "num_heads", "num_kv_heads", "head_dim")),
        ("eps", ctypes.c_float),
        ("bf16", ctypes.c_int32),
    )


class GemmCall(ctypes.Structure):
    """``KvrGemm`` of ``kernels.h``."""

    _fields_ = (
        *((name, _Pointer) for name in ("x", "weights", "out", "bias", "scales", "offsets", "row_scales")),
        *((name, _Int64) for name in ("num_rows", "size_in", "size_out", "x_stride", "panel_steps", "slab")),
        *((name, ctypes.c_int32) for name in ("kind", "out_bf16", "accumulate")),
    )


class NativeLibrary:
    """The functions of the library with their C types."""

    def __init__(self, openmp: ctypes.CDLL | None) -> None:
        """Load it. ``openmp``: a library through which the OpenMP of oneDNN is found; None: compute with one thread.

        Raises KernelsUnavailableError if it was not built when the package was installed.
        """
        path = library_path()
        if path is None:
            raise KernelsUnavailableError("the native kernels were not compiled when kvrelay was installed")
        try:
            calls = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelsUnavailableError(f"the native kernels cannot be loaded: {error}") from error
        if calls.kvr_version() != _INTERFACE_VERSION:
            raise KernelsUnavailableError(f"{path.name} is of another version of kvrelay: install it again")
        row = (_Int64, _Int64)
        flag, eps = ctypes.c_int32, ctypes.c_float
        calls.kvr_set_threads.argtypes = (ctypes.c_int32, _Pointer)
        calls.kvr_isa.restype = ctypes.c_char_p
        calls.kvr_embed.argtypes = (_Pointer, _Pointer, _Pointer, *row, flag)
        calls.kvr_rms_norm.argtypes = (_Pointer, _Pointer, _Pointer, _Pointer, *row, eps, flag)
        calls.kvr_silu_mul.argtypes = (_Pointer, _Pointer, *row, flag)
        calls.kvr_quantize.argtypes = (_Pointer, flag, _Pointer, _Pointer, *row, _Int64)
        calls.kvr_highest_allowed.argtypes = (_Pointer, _Pointer, _Int64)
        calls.kvr_highest_allowed.restype = _Int64
        self._calls = calls
        self._openmp = openmp
        self.embed = calls.kvr_embed
        self.rms_norm = calls.kvr_rms_norm
        self.silu_mul = calls.kvr_silu_mul
        self.heads = calls.kvr_heads
        self.attention = calls.kvr_attention
        self.multiply = calls.kvr_multiply
        self.quantize = calls.kvr_quantize
        self.highest_allowed = calls.kvr_highest_allowed

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        name: bytes = self._calls.kvr_isa()
        return name.decode()

    def supports(self, kind: GemmKind) -> bool:
        """Return whether this CPU has GEMMs of ``kind``."""
        return bool(self.multiply(ctypes.byref(GemmCall(kind=kind, size_out=1))))

    @property
    def owns_floats(self) -> bool:
        """Whether all float32 GEMMs should be our own, as on AVX2, where they are as fast as oneDNN's."""
        return self.isa == "avx2"

    def limit_isa(self, level: int) -> None:
        """Use no instruction set above ``level``: 0 any CPU, 1 AVX2, 2 AVX-512, 3 with VNNI, 4 with bfloat16."""
        self._calls.kvr_limit_isa(level)

    def set_num_threads(self, threads: int) -> None:
        """Compute with ``threads`` threads, the same threads as oneDNN."""
        run = getattr(self._openmp, "GOMP_parallel", None)
        self._calls.kvr_set_threads(threads, ctypes.cast(run, _Pointer) if run else None)


def library_path() -> Path | None:
    """Return where the compiled library is, or None."""
    return next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)
