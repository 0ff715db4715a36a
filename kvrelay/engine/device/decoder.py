"""The forward pass on the device, for every architecture: from token ids to sampled tokens.

It never waits for the device and does not depend on values computed there, so it can be captured as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvrelay.engine.decoder import DecoderWeights
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.device.framework import Tensor
from kvrelay.engine.device.operations import Operations, Sampled, StepTensors
from kvrelay.engine.device.projections import Projections
from kvrelay.engine.kernels import LayerKV


class Computed(NamedTuple):
    """Results of a step, on the device: ``sampled`` (None if no row samples) and ``broken_rows`` int32 [N].

    ``broken_rows`` is 1 where the last hidden state is not finite, and undefined for padding rows. ``residual`` [N,
    hidden]: the last hidden states, if they are to be kept.
    """

    sampled: Sampled | None
    broken_rows: Tensor
    residual: Tensor | None = None


class DeviceDecoder:
    """A loaded model. ``tables`` [rows, blocks] are block tables, ``last_tokens`` [rows] what was sampled last."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, operations: Operations, projections: Projections,
        tables: Tensor, last_tokens: Tensor,
    ) -> None:  # fmt: skip
        self._config = config
        self._weights = weights
        self._operations = operations
        self._projections = projections
        self._tables = tables
        self._last_tokens = last_tokens

    def compute(
        self,
        step: StepTensors,
        pool: Sequence[LayerKV],
        on_layer: Callable[[int], None] = lambda layer: None,
        *,
        keeps_residual: bool = False,
    ) -> Computed:
        """Compute and sample a step.

        Calls ``on_layer(layer)`` when the device has been told to write the layer's keys and values to ``pool``.
        """
        residual = self._forward(step, pool, on_layer)
        broken_rows = self._operations.broken_rows(residual)
        kept = residual if keeps_residual else None
        if not step.shape.samples:
            return Computed(None, broken_rows, kept)
        return Computed(self.sample(self._logits(residual, step.sample_rows), step), broken_rows, kept)

    def prompt_logprobs(self, residual: Tensor, rows: Tensor, targets: Tensor, num_alternatives: int) -> Sampled:
        """Return the log probabilities of ``targets`` after ``rows`` of ``residual``; see ``Operations``."""
        return self._operations.prompt_logprobs(self._logits(residual, rows), targets, num_alternatives)

    def _logits(self, residual: Tensor, rows: Tensor) -> Tensor:
        return self._projections.logits(residual, rows, self._weights.final_norm, self._weights.lm_head)

    def _forward(self, step: StepTensors, pool: Sequence[LayerKV], on_layer: Callable[[int], None]) -> Tensor:
        """Return what the last layer gives: [N, hidden]."""
        do, project, weights, eps = self._operations, self._projections, self._weights, self._config.rms_norm_eps
        residual = do.embed(step, self._last_tokens, weights.embedding)
        due: Tensor | None = None
        for index, layer in enumerate(weights.layers):
            qkv = project.normed(residual, due, layer.input_norm, layer.qkv)
            queries = do.apply_rope_and_write_kv(qkv, layer.head_norms, eps, step, pool[index])
            on_layer(index)
            attended = do.attention(queries, pool[index], step, self._tables, self._config.windows[index])
            due = project.add(residual, attended, layer.out)
            due = project.feed_forward(residual, due, layer.post_attention_norm, layer.gate_up, layer.down)
        return residual if due is None else residual.add_(due)

    def sample(self, logits: Tensor, step: StepTensors) -> Sampled:
        """Return the tokens sampled from ``logits``."""
        return self._operations.sample(logits, step, self._last_tokens)
