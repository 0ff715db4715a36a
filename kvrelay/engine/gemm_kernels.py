"""The portable kernels with oneDNN's GEMMs, used on a CPU if our own library was not compiled."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from kvrelay.engine.int8 import Quantization
from kvrelay.engine.kernels import HeadShape, PackedLinear, Tensor
from kvrelay.engine.onednn import Array, OneDNN, OneDNNLinear, rows_with_padding
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.portable import PortableKernels, round_rows


class _Packed(NamedTuple):
    """A weight packed by oneDNN. ``rounds_rows``: see ``portable.PackedWeight``."""

    linear: OneDNNLinear
    rounds_rows: bool


class GemmKernels(PortableKernels):
    """Inputs of GEMMs are ``dtype``; everything else, including KV, is float32."""

    def __init__(
        self, dtype: str, shape: HeadShape, onednn: OneDNN, quantization: Quantization = Quantization.NONE
    ) -> None:
        super().__init__("float32", shape, quantization)
        self._gemm_dtype = dtype
        self._onednn = onednn
        self._inputs: dict[int, Array] = {}

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, *, fp32_output: bool = False, never_quantize: bool = False
    ) -> PackedLinear:
        weight, rounds_rows = self._rounded(weight, never_quantize)
        values = None if bias is None else bias.numpy()
        return _Packed(self._onednn.pack(weight.numpy(), values, self._gemm_dtype, "float32"), rounds_rows)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        linear, rounds_rows = packed
        num_rows, width = x.shape
        if rounds_rows:
            x = round_rows(x)
        if self._gemm_dtype != "float32":
            x = x.cast(self._gemm_dtype)
        x = x.contiguous()
        size_bytes = num_rows * width * x.element_size()
        room = rows_with_padding(num_rows)
        source = self._inputs.get(width)
        if source is None or len(source.bytes) < room * width * x.element_size():
            source = self._inputs[width] = Array(room * width * x.element_size())
        ctypes.memmove(source.address, x.data_ptr(), size_bytes)
        out = paddle.empty([room, linear.shape[1]], "float32")
        linear.multiply(source.address, out.data_ptr(), num_rows)
        return out[:num_rows]
