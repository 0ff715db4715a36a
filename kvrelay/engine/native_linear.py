"""Linear layers of the native kernels: GEMMs by oneDNN, or by our own library for small batches and int8."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvrelay.engine.int8 import Quantization, quantize_rows
from kvrelay.engine.native.library import (
    COLUMNS,
    INT8_SLAB,
    OWN_CHUNK,
    STEP_BYTES,
    WIDENED_SLAB,
    GemmCall,
    GemmKind,
    NativeLibrary,
)
from kvrelay.engine.onednn import EXACT_ROWS, ITEM_BYTES, Array, OneDNNLinear, to_bfloat16
from kvrelay.errors import CheckpointError

Float32 = npt.NDArray[np.float32]

_MOST_ROWS = 48
"""With more rows oneDNN is as fast as our own GEMM, because computing takes longer than reading the weights."""

_CHUNKS = 512, 1024
"""Numbers of elements of a row that oneDNN sums before it adds the sum to the total, as observed."""

_UNQUANTIZED = {"float32": GemmKind.FLOATS, "bfloat16": GemmKind.HALVES}
_DEPTHS = {"float32": 1, "bfloat16": 2}


class NativeLinear(Protocol):
    """A packed weight. ``shape``: (in, out). ``out_dtype``: the type of the results."""

    shape: tuple[int, int]
    out_dtype: str

    def multiply(self, x: int, out: int, num_rows: int, accumulate: bool = False) -> None:
        """Multiply ``num_rows`` rows at address ``x`` by the weight and write the result to ``out``, or add it.

        Both must have room for ``rows_with_padding(num_rows)`` rows. The content of the padding rows is ignored.
        """


class SmallBatchGemm:
    """Finds the weights packed by oneDNN for which our own small-batch GEMM gives the same bits as oneDNN."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._slabs: dict[tuple[tuple[int, int], str, str], int] = {}

    def joined(self, packed: OneDNNLinear) -> NativeLinear:
        """Return ``packed``, with small batches computed by our own library if it rounds as oneDNN does."""
        key = packed.shape, packed.dtype, packed.out_dtype
        if key not in self._slabs:
            self._slabs[key] = self._slab(packed)
        slab = self._slabs[key]
        return _Joined(self._library, packed, slab) if slab else packed

    def _slab(self, packed: OneDNNLinear) -> int:
        """Return the number of steps per partial sum that gives oneDNN's bits, or 0 if none does."""
        size_in, size_out = packed.shape
        depth = _DEPTHS[packed.dtype]
        if size_in % depth or len(packed.array.bytes) != _panels(size_out) * _padded_steps(size_in, depth) * STEP_BYTES:
            return 0
        values = np.random.default_rng(0).standard_normal((EXACT_ROWS, size_in), np.float32)
        x = np.ascontiguousarray(values if packed.dtype == "float32" else to_bfloat16(values))
        row_bytes = size_out * ITEM_BYTES[packed.out_dtype]
        wanted, found = (np.zeros((EXACT_ROWS, row_bytes), np.uint8) for _ in range(2))
        packed.multiply(x.ctypes.data, wanted.ctypes.data, EXACT_ROWS)
        for chunk in _CHUNKS:
            own = _Joined(self._library, packed, chunk // depth)
            if own.multiply_few(x.ctypes.data, found.ctypes.data, EXACT_ROWS) and (found == wanted).all():
                return chunk // depth
        return 0


class _Joined:
    """A weight packed by oneDNN, with our own GEMM for small batches."""

    def __init__(self, library: NativeLibrary, packed: OneDNNLinear, slab: int) -> None:
        self.shape = packed.shape
        self.out_dtype = packed.out_dtype
        self._packed = packed
        self._library = library
        size_in, size_out = packed.shape
        self._bias = None if packed.bias is None else _padded(packed.bias)
        self._call = GemmCall(
            weights=packed.array.address,
            bias=_address(self._bias),
            size_in=size_in,
            size_out=size_out,
            x_stride=size_in,
            panel_steps=_padded_steps(size_in, _DEPTHS[packed.dtype]),
            slab=slab,
            kind=_UNQUANTIZED[packed.dtype],
            out_bf16=packed.out_dtype == "bfloat16",
        )

    def multiply(self, x: int, out: int, num_rows: int, accumulate: bool = False) -> None:
        if num_rows > _MOST_ROWS:
            self._packed.multiply(x, out, num_rows, accumulate)
        else:
            self.multiply_few(x, out, num_rows, accumulate)

    def multiply_few(self, x: int, out: int, num_rows: int, accumulate: bool = False) -> bool:
        """Multiply by our own library; return whether it can."""
        call = self._call
        call.x, call.out, call.num_rows, call.accumulate = x, out, num_rows, accumulate
        return bool(self._library.multiply(ctypes.byref(call)))


class OwnLinear:
    """A float32 weight whose GEMMs are all our own. It is stored in bfloat16 if that represents every element exactly.

    The weights of a bfloat16 checkpoint then have half the size, and the results are those of float32 weights.
    """

    out_dtype = "float32"

    def __init__(self, library: NativeLibrary, weight: Float32, bias: Float32 | None) -> None:
        """Pack ``weight`` [out, in], which is not kept."""
        size_out, size_in = weight.shape
        self.shape = size_in, size_out
        self._library = library
        bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
        is_narrow = size_in % 2 == 0 and not (bits & 0xFFFF).any()
        depth = 2 if is_narrow else 1
        self._weight = _panels_of((bits >> 16).astype(np.uint16) if is_narrow else weight, depth)
        self._bias = None if bias is None else _padded(bias)
        self._call = GemmCall(
            weights=self._weight.address,
            bias=_address(self._bias),
            size_in=size_in,
            size_out=size_out,
            x_stride=size_in,
            panel_steps=-(-size_in // depth),
            slab=OWN_CHUNK // depth,
            kind=GemmKind.FLOATS_BY_HALVES if is_narrow else GemmKind.FLOATS,
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight that a step reads."""
        return len(self._weight.bytes)

    def multiply(self, x: int, out: int, num_rows: int, accumulate: bool = False) -> None:
        call = self._call
        call.x, call.out, call.num_rows, call.accumulate = x, out, num_rows, accumulate
        self._library.multiply(ctypes.byref(call))


class QuantizedRows:
    """A reused buffer for the input rows of one GEMM as uint8 and for their scales."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._rows = np.empty(0, np.uint8)
        self._scales = np.empty(0, np.float32)

    def quantize(self, x: int, bf16: bool, num_rows: int, width: int, stride: int) -> tuple[int, int]:
        """Return the addresses of the ``num_rows`` rows at ``x`` as uint8, ``stride`` apart, and of their scales."""
        if self._rows.size < num_rows * stride:
            self._rows = np.empty(num_rows * stride, np.uint8)
        if self._scales.size < num_rows:
            self._scales = np.empty(num_rows, np.float32)
        rows, scales = self._rows.ctypes.data, self._scales.ctypes.data
        self._library.quantize(x, bf16, rows, scales, num_rows, width, stride)
        return rows, scales


class Int8Linear:
    """A weight in int8 (see ``int8``). Its GEMMs are our own."""

    def __init__(
        self,
        library: NativeLibrary,
        weight: Float32,
        bias: Float32 | None,
        quantization: Quantization,
        dtype: str,
        out_dtype: str,
        rows: QuantizedRows,
    ) -> None:
        """Pack ``weight`` [out, in], which is not kept. Raises CheckpointError if its input size must be even."""
        size_out, size_in = weight.shape
        self.shape = size_in, size_out
        self.out_dtype = out_dtype
        self._library = library
        self._is_exact = quantization is Quantization.W8A8
        self._bf16 = dtype == "bfloat16"
        self._rows = rows
        if self._is_exact:
            kind, depth, slab = GemmKind.INT8, 4, INT8_SLAB
        else:
            kind = GemmKind.HALVES_BY_INT8 if self._bf16 else GemmKind.FLOATS_BY_INT8
            depth, slab = _DEPTHS[dtype], WIDENED_SLAB
        if quantization is Quantization.W8A16 and size_in % depth:
            raise CheckpointError(
                f"engine.quantization: w8a16 in bfloat16 takes inputs in pairs, not {size_in} of them"
            )
        values, scales = quantize_rows(weight)
        self._weight = _panels_of(values, depth)
        self._scales = _padded(scales)
        # What an offset of 128 in every input element adds to each output.
        self._offsets = _padded(128 * values.sum(axis=1, dtype=np.int32))
        self._bias = None if bias is None else _padded(bias)
        steps = -(-size_in // depth)
        self._call = GemmCall(
            weights=self._weight.address,
            bias=_address(self._bias),
            scales=_address(self._scales),
            offsets=_address(self._offsets),
            size_in=size_in,
            size_out=size_out,
            x_stride=steps * depth,
            panel_steps=steps,
            slab=slab,
            kind=kind,
            out_bf16=out_dtype == "bfloat16",
        )

    def multiply(self, x: int, out: int, num_rows: int, accumulate: bool = False) -> None:
        call = self._call
        if self._is_exact:
            x, call.row_scales = self._rows.quantize(x, self._bf16, num_rows, self.shape[0], call.x_stride)
        call.x, call.out, call.num_rows, call.accumulate = x, out, num_rows, accumulate
        self._library.multiply(ctypes.byref(call))


def _panels(size_out: int) -> int:
    return -(-size_out // COLUMNS)


def _padded_steps(size_in: int, depth: int) -> int:
    """Return the number of steps of oneDNN's panels, a multiple of 16."""
    return -(-size_in // (16 * depth)) * 16


def _padded(column_values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Return ``column_values`` padded with zeros to whole panels."""
    return np.pad(column_values, (0, -len(column_values) % COLUMNS))


def _address(array: npt.NDArray[np.generic] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _panels_of(values: npt.NDArray[np.generic], depth: int) -> Array:
    """Return ``values`` [out, in] in panels [out / COLUMNS, in / depth, COLUMNS, depth], with zeros at the edges."""
    size_out, size_in = values.shape
    padded = np.pad(values, ((0, -size_out % COLUMNS), (0, -size_in % depth)))
    panels = padded.reshape(-1, COLUMNS, padded.shape[1] // depth, depth).transpose(0, 2, 1, 3)
    packed = Array(padded.nbytes)
    packed.bytes.view(values.dtype).reshape(panels.shape)[:] = panels
    return packed
