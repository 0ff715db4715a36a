"""The portable kernels with oneDNN's matrix products: what a CPU gets where our own library was not compiled."""

from __future__ import annotations

import ctypes

from kvrelay.engine.kernels import HeadShape, Tensor
from kvrelay.engine.onednn import Array, OneDNN, PackedLinear, rows_with_padding
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.portable import PortableKernels


class ProductKernels(PortableKernels):
    """See Kernels. Weights and what is multiplied with them are of ``dtype``; all else, KV included, is float32."""

    def __init__(self, dtype: str, shape: HeadShape, onednn: OneDNN) -> None:
        super().__init__("float32", shape)
        self._product_dtype = dtype
        self._onednn = onednn
        self._inputs: dict[int, Array] = {}

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, wide: bool = False) -> PackedLinear:
        """See Kernels."""
        values = None if bias is None else bias.numpy()
        return self._onednn.pack(weight.numpy(), values, self._product_dtype, "float32")

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """See Kernels."""
        num_rows, width = x.shape
        if self._product_dtype != "float32":
            x = x.cast(self._product_dtype)
        x = x.contiguous()
        size_bytes = num_rows * width * x.element_size()
        room = rows_with_padding(num_rows)
        source = self._inputs.get(width)
        if source is None or len(source.bytes) < room * width * x.element_size():
            source = self._inputs[width] = Array(room * width * x.element_size())
        ctypes.memmove(source.address, x.data_ptr(), size_bytes)
        out = paddle.empty([room, packed.shape[1]], "float32")
        packed.multiply(source.address, out.data_ptr(), num_rows)
        return out[:num_rows]
