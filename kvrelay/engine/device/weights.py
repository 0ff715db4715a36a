"""A model's weights on the device: read from a checkpoint, or random ones of any shape made there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvrelay.engine.decoder import DecoderWeights, LayerWeights
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.device.framework import Framework, Tensor
from kvrelay.engine.device.operations import Quantized
from kvrelay.engine.kernels import HeadNorms
from kvrelay.engine.safetensors_file import DTYPE_NAMES, StoredTensor


class Linear(NamedTuple):
    """A weight [out, in] and perhaps a bias [out]. ``scales`` float32 [out, 1]: the weight is in float8."""

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None = None


Quantize: TypeAlias = Callable[[Tensor], Quantized]
"""Returns a weight [out, in] in float8."""


class DevicePacking:
    """WeightPacking that copies every weight to the device as ``dtype``, in its original layout.

    ``quantize``: done to the weights of linear layers but the head.
    """

    def __init__(self, framework: Framework, dtype: str, quantize: Quantize | None = None) -> None:
        self._framework = framework
        self._dtype = dtype
        self._quantize = quantize

    def upload(self, array: npt.NDArray[np.float32]) -> Tensor:
        return self._framework.upload(array, self._dtype)

    def upload_stored(self, parts: Sequence[StoredTensor]) -> Tensor:
        """UploadsStored that copies each tensor from the mapped file to its place on the device."""
        rows = sum(part.shape[0] for part in parts)
        joined = self._framework.empty((rows, *parts[0].shape[1:]), self._dtype)
        first = 0
        for part in parts:
            end = first + part.shape[0]
            self._framework.upload_to(joined[first:end], part.raw, DTYPE_NAMES[part.dtype])
            first = end
        return joined

    def pack_table(self, table: Tensor) -> Tensor:
        return table

    def pack_norm(self, weight: Tensor) -> Tensor:
        return weight

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, *, fp32_output: bool = False, never_quantize: bool = False
    ) -> Linear:
        if self._quantize is None or never_quantize:
            return Linear(weight, bias)
        values, scales = self._quantize(weight)
        return Linear(values, bias, scales)


class RandomWeights:
    """Makes the weights of any config on the device: normal with a deviation of 0.02, biases and norms likewise.

    Each tensor has a seed of its own, so the same config gives the same weights on the same kind of device.
    ``quantize``: see DevicePacking.
    """

    def __init__(
        self, framework: Framework, config: DecoderConfig, dtype: str, quantize: Quantize | None = None
    ) -> None:
        self._packing = DevicePacking(framework, dtype, quantize)
        self._framework = framework
        self._config = config
        self._dtype = dtype
        self._seed = 0

    def make(self) -> DecoderWeights:
        """Return all of them."""
        config = self._config
        table = self._normal(config.vocab_size, config.hidden_size)
        head = table if config.tied_embeddings else self._normal(config.vocab_size, config.hidden_size)
        layers = [self._layer() for _ in range(config.num_layers)]
        return DecoderWeights(table, layers, self._norm(config.hidden_size), Linear(head, None))

    def _layer(self) -> LayerWeights:
        config = self._config
        hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
        return LayerWeights(
            input_norm=self._norm(hidden),
            qkv=self._linear(config.qkv_size, hidden, config.qkv_bias),
            head_norms=HeadNorms(self._norm(dim), self._norm(dim)) if config.qk_norm else None,
            out=self._linear(hidden, config.num_heads * dim, config.out_bias),
            post_attention_norm=self._norm(hidden),
            gate_up=self._linear(2 * ffn, hidden, config.mlp_bias),
            down=self._linear(hidden, ffn, config.mlp_bias),
        )

    def _linear(self, rows: int, columns: int, has_bias: bool) -> Linear:
        return self._packing.pack_linear(self._normal(rows, columns), self._normal(rows) if has_bias else None)

    def _normal(self, *shape: int) -> Tensor:
        self._seed += 1
        return self._framework.normal(shape, self._dtype, 0.02, self._seed)

    def _norm(self, width: int) -> Tensor:
        return self._normal(width) + 1.0
