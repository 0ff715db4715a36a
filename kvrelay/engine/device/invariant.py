"""Operations and projections whose bits for a token depend on its sequence alone, not on the batch or on chunks.

Sums are made in an order that only the weight, or the position in the context, decides. See ADR 18.
"""

from __future__ import annotations

from kvrelay.engine.device.framework import Framework, Tensor
from kvrelay.engine.device.kernels import invariant_attention as attention
from kvrelay.engine.device.kernels import invariant_gemm as products
from kvrelay.engine.device.operations import OperationLimits, Operations, StepTensors
from kvrelay.engine.device.projections import FrameworkProjections
from kvrelay.engine.device.triton_operations import TritonOperations
from kvrelay.engine.device.weights import Linear
from kvrelay.engine.kernels import HeadShape, LayerKV
from kvrelay.errors import ConfigError

MOST_SPREAD = 16
"""Single tokens in a step up to which pieces of their contexts have programs of their own."""

_WIDEST = 128
"""Elements of a head up to which a tile fits the registers of four warps."""


class InvariantOperations(TritonOperations):
    """Triton's operations with batch-invariant attention; the others are so already: a row is computed by itself."""

    def __init__(self, framework: Framework, heads: HeadShape, limits: OperationLimits) -> None:
        super().__init__(framework, heads, limits)
        self.tiling = attention.FAST if heads.head_dim <= _WIDEST else attention.WIDE
        if self._exact:
            self.tiling = attention.EXACT
        shared = heads.num_heads // heads.num_kv_heads
        if shared > self.tiling.rows:
            raise ConfigError(
                [
                    f"engine.deterministic: {shared} query heads that share a KV head are more than "
                    f"{self.tiling.rows}, the rows of a tile"
                ]
            )
        self.tile_rows = self.tiling.tokens(shared)
        self.room = None
        self._pieces: tuple[Tensor, Tensor, Tensor] | None = None

    def attention(
        self, queries: Tensor, layer: LayerKV, step: StepTensors, tables: Tensor, window: int | None
    ) -> Tensor:
        rows, decodes, tiles, *_ = step.shape
        out = self._framework.empty((rows, self._heads.num_heads, self._heads.head_dim), self._limits.dtype)
        size, exact, keys, values = self._limits.block_size, self._exact, layer.keys, layer.values
        if decodes:
            scratch = self._room_for_pieces() if decodes <= MOST_SPREAD else None
            attention.attention_of_singles(
                queries[:decodes], keys, values, step.positions, step.table_rows, tables, out, scratch,
                self._limits.max_model_len, size, window, exact, self.tiling,
            )  # fmt: skip
        if tiles:
            attention.attention_of_tiles(
                queries, keys, values, step.tiles, tables, out, size, window, exact, self.tiling
            )
        return out.view(rows, -1)

    def _room_for_pieces(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same memory for every step, so graphs may hold on to it."""
        if self._pieces is None:
            heads, make = self._heads, self._framework
            parts, stats, tickets = attention.scratch_sizes(
                MOST_SPREAD, self._limits.max_model_len, heads.num_heads, heads.num_kv_heads, heads.head_dim,
                self.tiling,
            )  # fmt: skip
            self._pieces = (
                make.empty((parts,), "float32"), make.empty((stats,), "float32"), make.zeros((tickets,), "int32")
            )  # fmt: skip
        return self._pieces


class InvariantProjections(FrameworkProjections):
    """Projections by our own GEMM, which adds to the residual itself."""

    def __init__(self, framework: Framework, operations: Operations, eps: float, dtype: str) -> None:
        super().__init__(framework, operations, eps)
        self._dtype = dtype
        self.tiling = products.EXACT if dtype == "float32" else products.FAST
        self._scratch: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def normed(self, residual: Tensor, due: Tensor | None, norm: Tensor, linear: Linear) -> Tensor:
        return self._product(self._operations.rms_norm(residual, norm, self._eps), linear, self._dtype)

    def add(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor | None:
        self._compute(x, linear, residual, adds=True)
        return None

    def logits(self, residual: Tensor, rows: Tensor, norm: Tensor, head: Linear) -> Tensor:
        return self._product(self._operations.rms_norm(residual, norm, self._eps, rows), head, "float32")

    def _product(self, x: Tensor, linear: Linear, dtype: str) -> Tensor:
        out = self._framework.empty((x.shape[0], linear.weight.shape[0]), dtype)
        self._compute(x, linear, out, adds=False)
        return out

    def _compute(self, x: Tensor, linear: Linear, out: Tensor, *, adds: bool) -> None:
        scratch = self._scratch_for(*linear.weight.shape)
        products.gemm(x, linear.weight, linear.bias, out, scratch, adds, self._dtype == "float32", self.tiling)

    def _scratch_for(self, columns: int, depth: int) -> tuple[Tensor, Tensor]:
        """Return the same memory for every product with weights of a shape, so graphs may hold on to it."""
        if (columns, depth) not in self._scratch:
            parts, tickets = products.scratch_sizes(columns, depth, self.tiling)
            make = self._framework
            self._scratch[columns, depth] = make.empty((parts,), "float32"), make.zeros((tickets,), "int32")
        return self._scratch[columns, depth]
