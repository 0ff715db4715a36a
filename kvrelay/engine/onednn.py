"""GEMMs through the oneDNN library in Paddle's wheel, by its C interface.

The wheel carries the library and not its headers; the numbers below are those of oneDNN 3's public ones. Weights are
packed once, into the layout oneDNN likes best on this CPU, and each GEMM is then one call.

A row of a GEMM does not depend, bit for bit, on how many other rows there are: see ``_Gemms.pieces``.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrelay.errors import KernelsUnavailableError

_MAJOR_VERSION = 3
_CPU, _IN_ORDER, _INFERENCE = 1, 1, None
_FORMAT_ANY, _FORMAT_ROWS = 1, 3
_QUERY_IMPL_NAME, _QUERY_WEIGHTS = 8, 131
_ARG_FROM, _ARG_SRC, _ARG_TO, _ARG_DST, _ARG_WEIGHTS, _ARG_BIAS = 1, 1, 17, 17, 33, 41
_DTYPES = {"bfloat16": 2, "float32": 3}
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
_ALIGNMENT = 64
_HUGE_PAGE_BYTES = 2 << 20

_FEWEST_ROWS = 2  # one row takes another path through oneDNN, which sums long rows in another order
EXACT_ROWS, _ROW_STEP = 64, 16

Float32 = npt.NDArray[np.float32]
_Pointer = ctypes.c_void_p


class _Argument(ctypes.Structure):
    _fields_ = (("index", ctypes.c_int), ("memory", _Pointer))


class Array:
    """Memory for ``size_bytes``, aligned as oneDNN likes it, on huge pages if it is large: at ``address``."""

    def __init__(self, size_bytes: int) -> None:
        room = max(size_bytes, 1) + _ALIGNMENT
        if room >= 2 * _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            mapping = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            mapping.madvise(mmap.MADV_HUGEPAGE)
            memory = np.frombuffer(mapping, np.uint8)
        else:
            memory = np.empty(room, np.uint8)
        offset = -memory.ctypes.data % _ALIGNMENT
        self.bytes = memory[offset : offset + size_bytes]
        self.address: int = self.bytes.ctypes.data


class OneDNN:
    """The library, ready to be called, with one engine and one stream for this process."""

    def __init__(self, path: Path) -> None:
        """Raise KernelsUnavailableError if there is no library at ``path``, or not the one this module knows."""
        try:
            self.calls = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelsUnavailableError(f"Paddle's oneDNN cannot be loaded: {error}") from error
        self.calls.dnnl_version.restype = ctypes.POINTER(_Version)
        version = self.calls.dnnl_version().contents
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != _MAJOR_VERSION:
            raise KernelsUnavailableError(f"Paddle's oneDNN is {self.version}, not {_MAJOR_VERSION}.x")
        self.calls.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        self.calls.dnnl_primitive_desc_query_md.restype = _Pointer
        self.calls.dnnl_cpu_isa2str.restype = ctypes.c_char_p
        self.engine = self._made("dnnl_engine_create", _CPU, ctypes.c_size_t(0))
        self.stream = self._made("dnnl_stream_create", self.engine, _IN_ORDER)
        isa: bytes = self.calls.dnnl_cpu_isa2str(self.calls.dnnl_get_effective_cpu_isa())
        self.isa = isa.decode().removeprefix("cpu_isa_").lower()
        self._execute = self.calls.dnnl_primitive_execute
        self._gemms: dict[tuple[Any, ...], _Gemms] = {}

    def supports_dtype(self, dtype: str) -> bool:
        """Return whether this CPU has fast GEMMs in ``dtype``; AVX2 and early AVX-512 CPUs only emulate bfloat16."""
        try:
            gemm = self._matmul_desc((64, 256, 256), dtype, "float32", None, False, False)
        except KernelsUnavailableError:
            return False
        name = ctypes.c_char_p()
        self._check(self.calls.dnnl_primitive_desc_query(gemm, _QUERY_IMPL_NAME, 0, ctypes.byref(name)), "query")
        return (name.value or b"").startswith(b"brg")

    def pack(self, weight: Float32, bias: Float32 | None, dtype: str, out_dtype: str) -> OneDNNLinear:
        """Pack ``weight`` [out, in], which is not kept, as ``dtype``. Results are of type ``out_dtype``."""
        weight = np.ascontiguousarray(weight, np.float32)
        size_out, size_in = weight.shape
        plain = self._made(
            "dnnl_memory_desc_create_with_strides", 2, _dims(size_in, size_out), _DTYPES["float32"], _dims(1, size_in)
        )
        gemm = self._matmul_desc((64, size_in, size_out), dtype, out_dtype, None, False, False)
        layout = _Pointer(self.calls.dnnl_primitive_desc_query_md(gemm, _QUERY_WEIGHTS, 0))
        array = Array(self.calls.dnnl_memory_desc_get_size(layout))
        packed = self.memory(layout, array.address)
        reorder_desc = self._made("dnnl_reorder_primitive_desc_create", plain, self.engine, layout, self.engine, None)
        reorder = self._made("dnnl_primitive_create", reorder_desc)
        self.execute(reorder, _arguments((_ARG_FROM, self.memory(plain, weight.ctypes.data)), (_ARG_TO, packed)))
        self.calls.dnnl_primitive_destroy(reorder)
        self.calls.dnnl_primitive_desc_destroy(reorder_desc)
        bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
        return OneDNNLinear(self, (size_in, size_out), dtype, out_dtype, layout, array, packed, bias)

    def gemms(self, linear: OneDNNLinear, accumulate: bool) -> _Gemms:
        """Return the primitives of linears with this one's shape and types."""
        key = (linear.shape, linear.dtype, linear.out_dtype, linear.bias is not None, accumulate)
        if key not in self._gemms:
            self._gemms[key] = _Gemms(self, linear, accumulate)
        return self._gemms[key]

    def gemm_primitive(self, num_rows: int, linear: OneDNNLinear, accumulate: bool) -> _Gemm:
        """Return a primitive for ``num_rows`` rows and a weight like that of ``linear``."""
        size_in, size_out = linear.shape
        sizes = (num_rows, size_in, size_out)
        has_bias = linear.bias is not None
        desc = self._matmul_desc(sizes, linear.dtype, linear.out_dtype, linear.layout, has_bias, accumulate)
        return _Gemm(
            self._made("dnnl_primitive_create", desc),
            self.memory(self._rows_desc((num_rows, size_in), linear.dtype), None),
            self.memory(self._rows_desc((num_rows, size_out), linear.out_dtype), None),
        )

    def memory(self, desc: _Pointer, address: int | None) -> _Pointer:
        """Return a memory object for what is at ``address``."""
        return self._made("dnnl_memory_create", desc, self.engine, _Pointer(address))

    def bias_memory(self, bias: Float32) -> _Pointer:
        """Return a memory object for ``bias``."""
        return self.memory(self._rows_desc((1, len(bias)), "float32"), bias.ctypes.data)

    def execute(self, primitive: _Pointer, arguments: ctypes.Array[_Argument]) -> None:
        """Run ``primitive`` to its end."""
        status = self._execute(primitive, self.stream, len(arguments), arguments)
        if status:
            self._check(status, "execute")

    def _matmul_desc(
        self,
        sizes: tuple[int, int, int],
        dtype: str,
        out_dtype: str,
        layout: _Pointer | None,
        has_bias: bool,
        accumulate: bool,
    ) -> _Pointer:
        rows, size_in, size_out = sizes
        weights = layout or self._desc((size_in, size_out), dtype, _FORMAT_ANY)
        attributes = self._made("dnnl_primitive_attr_create")
        if accumulate:
            post_ops = self._made("dnnl_post_ops_create")
            one, no_offset, as_dst = ctypes.c_float(1.0), 0, 0
            self._check(self.calls.dnnl_post_ops_append_sum(post_ops, one, no_offset, as_dst), "append_sum")
            self._check(self.calls.dnnl_primitive_attr_set_post_ops(attributes, post_ops), "set_post_ops")
        return self._made(
            "dnnl_matmul_primitive_desc_create",
            self.engine,
            self._rows_desc((rows, size_in), dtype),
            weights,
            self._rows_desc((1, size_out), "float32") if has_bias else None,
            self._rows_desc((rows, size_out), out_dtype),
            attributes,
        )

    def _rows_desc(self, shape: tuple[int, int], dtype: str) -> _Pointer:
        return self._desc(shape, dtype, _FORMAT_ROWS)

    def _desc(self, shape: tuple[int, int], dtype: str, layout: int) -> _Pointer:
        return self._made("dnnl_memory_desc_create_with_tag", 2, _dims(*shape), _DTYPES[dtype], layout)

    def _made(self, function: str, *arguments: Any) -> _Pointer:
        made = _Pointer()
        self._check(getattr(self.calls, function)(ctypes.byref(made), *arguments), function)
        return made

    def _check(self, status: int, what: str) -> None:
        if status:
            raise KernelsUnavailableError(f"oneDNN {self.version}: {what} gave status {status}")


class OneDNNLinear:
    """One weight in oneDNN's layout, and a bias [out] in float32. ``shape``: (in, out)."""

    def __init__(
        self,
        library: OneDNN,
        shape: tuple[int, int],
        dtype: str,
        out_dtype: str,
        layout: _Pointer,
        array: Array,
        memory: _Pointer,
        bias: Float32 | None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.out_dtype = out_dtype
        self.layout = layout
        self.array = array
        self.bias = bias
        self._library = library
        self._memory = memory
        self._bias_memory = None if bias is None else library.bias_memory(bias)
        self._calls: dict[tuple[int, bool], list[_Call]] = {}

    def multiply(self, x: int, out: int, num_rows: int, accumulate: bool = False) -> None:
        """Multiply ``num_rows`` rows at address ``x`` by the weight and write the result to ``out``, or add it.

        Both must have room for ``rows_with_padding(num_rows)`` rows. The content of the padding rows is ignored.
        """
        calls = self._calls.get((num_rows, accumulate))
        if calls is None:
            calls = self._calls[num_rows, accumulate] = self._prepare(num_rows, accumulate)
        for call in calls:
            call.run(x, out)
            x += call.x_bytes
            out += call.out_bytes

    def call(self, gemms: _Gemms, num_rows: int) -> _Call:
        """Return the call for exactly ``num_rows`` rows with this weight."""
        gemm = gemms.of(num_rows, self)
        bias = [] if self._bias_memory is None else [(_ARG_BIAS, self._bias_memory)]
        arguments = _arguments((_ARG_SRC, gemm.src), (_ARG_WEIGHTS, self._memory), (_ARG_DST, gemm.dst), *bias)
        row_bytes = self.shape[0] * ITEM_BYTES[self.dtype], self.shape[1] * ITEM_BYTES[self.out_dtype]
        return _Call(self._library, gemm, arguments, num_rows * row_bytes[0], num_rows * row_bytes[1])

    def _prepare(self, num_rows: int, accumulate: bool) -> list[_Call]:
        gemms = self._library.gemms(self, accumulate)
        return [self.call(gemms, piece) for piece in gemms.pieces(num_rows, self)]


class _Call:
    """One GEMM call with one weight. ``x_bytes`` and ``out_bytes``: the sizes of its input and output."""

    __slots__ = ("_arguments", "_gemm", "_library", "out_bytes", "x_bytes")

    def __init__(
        self,
        library: OneDNN,
        gemm: _Gemm,
        arguments: ctypes.Array[_Argument],
        x_bytes: int,
        out_bytes: int,
    ) -> None:
        self._library = library
        self._gemm = gemm
        self._arguments = arguments
        self.x_bytes = x_bytes
        self.out_bytes = out_bytes

    def run(self, x: int, out: int) -> None:
        gemm, library = self._gemm, self._library
        if gemm.x != x or gemm.out != out:
            gemm.point_to(library, x, out)
        library.execute(gemm.primitive, self._arguments)


@dataclass(slots=True)
class _Gemm:
    """A primitive with the memory objects of its rows, which point to the addresses of its last call."""

    primitive: _Pointer
    src: _Pointer
    dst: _Pointer
    x: int = 0
    out: int = 0

    def point_to(self, library: OneDNN, x: int, out: int) -> None:
        library.calls.dnnl_memory_set_data_handle(self.src, _Pointer(x))
        library.calls.dnnl_memory_set_data_handle(self.dst, _Pointer(out))
        self.x, self.out = x, out


class _Gemms:
    """The primitives for one shape, one for each number of rows used so far."""

    def __init__(self, library: OneDNN, linear: OneDNNLinear, accumulate: bool) -> None:
        self._library = library
        self._accumulate = accumulate
        self._gemms: dict[int, _Gemm] = {}
        self._pieces: dict[int, Sequence[int]] = {}
        rng = np.random.default_rng(0)
        self._probe = rng.standard_normal((EXACT_ROWS, linear.shape[0]), np.float32)
        self._wanted: npt.NDArray[np.uint8] | None = None

    def of(self, num_rows: int, linear: OneDNNLinear) -> _Gemm:
        """Return the primitive for ``num_rows``."""
        gemm = self._gemms.get(num_rows)
        if gemm is None:
            gemm = self._gemms[num_rows] = self._library.gemm_primitive(num_rows, linear, self._accumulate)
        return gemm

    def pieces(self, num_rows: int, linear: OneDNNLinear) -> Sequence[int]:
        """Return the sizes of the calls that compute ``num_rows`` rows: usually one call of slightly more rows.

        oneDNN chooses its blocking by the number of rows, and another order of additions rounds differently. A size is
        therefore used only if it gives the same bits as 64 rows; else the next larger size is tried, else calls of 64
        rows are used.
        """
        pieces = self._pieces.get(num_rows)
        if pieces is None:
            pieces = self._pieces[num_rows] = self._choose(num_rows, linear)
        return pieces

    def _choose(self, num_rows: int, linear: OneDNNLinear) -> Sequence[int]:
        candidate = _padded(num_rows)
        while candidate < EXACT_ROWS and not self._rounds_alike(candidate, linear):
            candidate += 1
        if candidate <= EXACT_ROWS or self._rounds_alike(candidate, linear):
            return (candidate,)
        return (EXACT_ROWS,) * -(-num_rows // EXACT_ROWS)

    def _rounds_alike(self, num_rows: int, linear: OneDNNLinear) -> bool:
        if self._wanted is None:
            self._wanted = self._probed(EXACT_ROWS, linear)
        found, wanted = self._probed(num_rows, linear), self._wanted
        last = (num_rows - 1) % EXACT_ROWS
        shared = min(num_rows, EXACT_ROWS)
        return bool((found[:shared] == wanted[:shared]).all() and (found[-1] == wanted[last]).all())

    def _probed(self, num_rows: int, linear: OneDNNLinear) -> npt.NDArray[np.uint8]:
        rows = self._probe[np.arange(num_rows) % EXACT_ROWS]
        x = np.ascontiguousarray(rows if linear.dtype == "float32" else to_bfloat16(rows))
        out = np.zeros((num_rows, linear.shape[1] * ITEM_BYTES[linear.out_dtype]), np.uint8)
        linear.call(self, num_rows).run(x.ctypes.data, out.ctypes.data)
        return out


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


def rows_with_padding(num_rows: int) -> int:
    """Return the number of rows a buffer needs so that a GEMM of ``num_rows`` rows can be padded."""
    return -(-num_rows // EXACT_ROWS) * EXACT_ROWS


def _padded(num_rows: int) -> int:
    """Return the next number of rows for which primitives are created. Beyond 64 these are multiples of 16."""
    if num_rows <= EXACT_ROWS:
        return max(num_rows, _FEWEST_ROWS)
    return -(-num_rows // _ROW_STEP) * _ROW_STEP


def to_bfloat16(values: Float32) -> npt.NDArray[np.uint16]:
    """Return finite ``values`` rounded to bfloat16, held as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return rounded


def _dims(*sizes: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 12)(*sizes)


def _arguments(*pairs: tuple[int, _Pointer]) -> ctypes.Array[_Argument]:
    return (_Argument * len(pairs))(*(_Argument(index, memory) for index, memory in pairs))
