"""The engine that runs a real model on Paddle."""

from __future__ import annotations

from collections.abc import Callable

from kvrelay.core.errors import EngineError
from kvrelay.core.geometry import KVGeometry
from kvrelay.core.kv_memory import KVMemory
from kvrelay.core.step import StepPlan, StepResult
from kvrelay.engine.batch import BatchAssembler, PoolLimits, RaggedBatch
from kvrelay.engine.decoder import Decoder
from kvrelay.engine.kernels import KVPool
from kvrelay.engine.kv_pool import StagedPool
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.sampler import sample_step


class PaddleEngine:
    """A decoder with its KV pool (see ``interface.Engine``). ``staged``: the pool is a copy on the device."""

    def __init__(
        self,
        decoder: Decoder,
        geometry: KVGeometry,
        num_blocks: int,
        vocab_size: int,
        max_model_len: int,
        staged: bool = False,
    ) -> None:
        self.geometry = geometry
        self.memory = KVMemory.create(geometry, num_blocks)
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._decoder = decoder
        self._pool: KVPool = StagedPool(self.memory) if staged else decoder.map_pool(self.memory)
        self._assembler = BatchAssembler(PoolLimits(geometry.block_size, num_blocks, max_model_len))

    def run(self, plan: StepPlan, on_layer: Callable[[int], None]) -> StepResult:
        """See Engine."""
        batch = self._batch(plan)
        pool = self._pool

        def layer_written(layer: int) -> None:
            pool.after_layer(layer, batch)
            on_layer(layer)

        with paddle.no_grad():
            pool.before_step(plan.batch)
            logits = self._decoder.forward(batch, pool.layers, layer_written)
        return StepResult(plan.step, sample_step(logits, plan.batch))

    def _batch(self, plan: StepPlan) -> RaggedBatch:
        if not plan.batch:
            raise EngineError("a step without sequences")
        batch = self._assembler.assemble(plan.batch)
        lowest, highest = int(batch.token_ids.min()), int(batch.token_ids.max())
        if lowest < 0 or highest >= self.vocab_size:
            raise EngineError(f"token ids {lowest} to {highest} leave the vocabulary of {self.vocab_size}")
        return batch

    def close(self) -> None:
        """See Engine."""
        del self._pool  # its tensors and arrays keep the memory mapped
        self.memory.close()
