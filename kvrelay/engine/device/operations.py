"""What the decoder does between linear layers, as the device's kernels or their references do it.

Letters in shapes: N rows (tokens) of a step, H query heads, G key/value heads, D elements of a head, S sampling rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvrelay.engine.device.framework import Tensor
from kvrelay.engine.device.tiles import DenseRoom
from kvrelay.engine.kernels import HeadNorms, LayerKV

MOST_LOGPROBS = 20
"""Alternatives that can be reported with a token: the most the OpenAI API allows."""

NOT_FINITE = -1
"""In place of a token: a logit is NaN or plus infinity, or all are minus infinity."""

NONE_LEFT = -2
"""In place of a token: bias and bans leave no token to choose."""


@dataclass(frozen=True, slots=True)
class OperationLimits:
    """``dtype`` of activations, weights and pool; tokens of a block; the longest sequence; the most in one step.

    ``gathered``: tokens of context that are gathered at most, for chunks of ``gathered_from`` tokens on; see DenseRoom.
    """

    dtype: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    gathered: int = 0
    gathered_from: int = 512


class StepShape(NamedTuple):
    """How many rows a step has; the first ``decodes`` of them are sequences of one token, the others lie in tiles.

    ``dense_tiles`` are those whose context is gathered, into ``pieces``.
    """

    rows: int
    decodes: int
    tiles: int
    samples: int
    dense_tiles: int = 0
    pieces: int = 0


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step on the device, all int32 unless said otherwise.

    By row [N]: ``tokens`` (below 0: the last one sampled for its sequence), ``positions``, ``slots`` to write keys and
    values to (below 0: none), ``table_rows`` (below 0: padding). ``tiles`` [4, T], ``dense_tiles`` [4, U], ``pieces``
    [3, P]: see Tiles.
    By sampling row [S]: ``sample_rows``, ``reals`` float64 [4, capacity] and ``numbers`` [6, capacity]: see sample.
    ``adjusted_tokens`` [entries] and ``changes`` float32 [3, entries]: see sample. ``masks`` [masks, words]: a bit for
    each token, 1 where a grammar allows it.
    """

    shape: StepShape
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    table_rows: Tensor
    tiles: Tensor
    dense_tiles: Tensor
    pieces: Tensor
    sample_rows: Tensor
    reals: Tensor
    numbers: Tensor
    adjusted_tokens: Tensor
    changes: Tensor
    masks: Tensor


class Sampled(NamedTuple):
    """``tokens`` int32 [S]: below 0 where there is none, NOT_FINITE or NONE_LEFT.

    ``logprobs`` float32 [S, 1 + most] of the token itself and of ``top_tokens`` int32 [S, 1 + most], whose first column
    means nothing.
    """

    tokens: Tensor
    top_tokens: Tensor
    logprobs: Tensor


class Quantized(NamedTuple):
    """Rows in float8 (e4m3): ``values`` [N, width] and ``scales`` float32 [N, 1]."""

    values: Tensor
    scales: Tensor


class Operations(Protocol):
    """``tile_rows``: how many consecutive queries of a sequence form a tile at most. ``room`` for gathered contexts."""

    tile_rows: int
    room: DenseRoom | None

    def embed(self, step: StepTensors, last_tokens: Tensor, table: Tensor) -> Tensor:
        """Return rows of ``table`` for the step's tokens: [N, hidden]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        """Return the RMS norm of ``x`` [N, width] or of its ``rows``."""

    def broken_rows(self, x: Tensor) -> Tensor:
        """Return for each row of ``x`` [N, width] whether anything in it is not finite: int32 [N], 0 or 1."""

    def apply_rope_and_write_kv(
        self, qkv: Tensor, norms: HeadNorms | None, eps: float, step: StepTensors, layer: LayerKV
    ) -> Tensor:
        """Normalize and turn the heads of ``qkv`` [N, (H + 2 * G) * D], write keys and values.

        Returns queries [N, H, D].
        """

    def attention(
        self, queries: Tensor, layer: LayerKV, step: StepTensors, tables: Tensor, window: int | None
    ) -> Tensor:
        """Return attention of ``queries`` [N, H, D] over what ``layer`` holds of their sequences: [N, H * D]."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up for ``gate_up`` [N, 2 * ffn], gate first: [N, ffn]."""

    def sample(self, logits: Tensor, step: StepTensors, last_tokens: Tensor) -> Sampled:
        """Sample from ``logits`` float32 [S, vocab]; also note tokens in ``last_tokens`` where the step says so."""

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, num_alternatives: int) -> Sampled:
        """Return the log probabilities of ``targets`` int32 [S] and of the most likely tokens, from ``logits``.

        In place of tokens there are ranks: how many tokens are at least as likely as the target, or NOT_FINITE.
        """

    def set_entries(self, table: Tensor, entries: Tensor) -> None:
        """Set flat places ``entries[0]`` of ``table`` to ``entries[1]``, all int32."""


class QuantizingOperations(Operations, Protocol):
    """Operations that give rows in float8 too."""

    def quantized(self, x: Tensor) -> Quantized:
        """Return ``x`` [N, width] in float8."""

    def quantized_norm(self, residual: Tensor, due: Tensor | None, weight: Tensor, eps: float) -> Quantized:
        """Add ``due`` to ``residual`` [N, width] in place, unless it is None; return the RMS norm of that in float8."""

    def quantized_silu_mul(self, gate_up: Tensor) -> Quantized:
        """Return what ``silu_mul`` does, in float8."""
