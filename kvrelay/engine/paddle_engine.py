"""The engine that runs a real model on Paddle."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.engine.batch import BatchAssembler, Bools, RaggedBatch, StepLimits
from kvrelay.engine.decoder import Decoder
from kvrelay.engine.isolation import OnLayers, compute_isolated
from kvrelay.engine.kernels import KVPool
from kvrelay.engine.kv_pool import StagedPool
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.prompt_logprobs import PromptRows, prompt_rows
from kvrelay.engine.sequences import EngineSequences, ScheduledSequence
from kvrelay.errors import EngineError
from kvrelay.grammar.masks import GrammarMasks
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome, StepPlan, StepResult


class PaddleEngine:
    """A decoder with its KV pool (see ``interface.Engine``), which closes ``grammars`` when it is closed.

    ``staged``: the pool is a copy on the device.
    """

    def __init__(
        self,
        decoder: Decoder,
        geometry: KVGeometry,
        num_blocks: int,
        vocab_size: int,
        max_model_len: int,
        grammars: GrammarMasks,
        staged: bool = False,
    ) -> None:
        self.geometry = geometry
        self.memory = KVMemory.create(geometry, num_blocks)
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.max_plans_in_flight = 1
        self._decoder = decoder
        self._grammars = grammars
        self._sequences = EngineSequences(grammars)
        self._pool: KVPool = StagedPool(self.memory) if staged else decoder.map_pool(self.memory)
        self._assembler = BatchAssembler(StepLimits(geometry.block_size, num_blocks, max_model_len, vocab_size))

    def run(self, plan: StepPlan, on_layers: OnLayers) -> StepResult:
        if not plan.batch:
            raise EngineError("a step without sequences")
        items = self._sequences.apply(plan)
        self._sequences.begin_masks(items)
        outcomes = compute_isolated(plan.step, items, self._compute, on_layers)
        return self._sequences.result(plan, items, outcomes)

    def _compute(self, items: list[ScheduledSequence], on_layers: OnLayers) -> list[SequenceOutcome]:
        """Return the outcome of each of ``items``."""
        batch = self._assembler.assemble(items)
        return batch.outcomes(self._forward(batch, on_layers) if batch.items else [])

    def _forward(self, batch: RaggedBatch, on_layers: OnLayers) -> list[SequenceOutcome]:
        """Return the outcome of each of the batch's items."""
        pool = self._pool

        def layer_written(layer: int) -> None:
            pool.after_layer(layer, batch)
            on_layers(range(layer, layer + 1))

        with paddle.no_grad():
            pool.before_step(batch.items)
            outcomes, broken_rows = self._decoder.forward(batch, pool.layers, layer_written, self._prompt_rows(batch))
        if broken_rows is not None:
            _fail_broken(outcomes, batch, broken_rows)
        for index, item in enumerate(batch.items):
            if item.drafts and isinstance(outcomes[index], SequenceFailed):
                # Perhaps a guess is what is not finite, and spoils the rows before it (see _fail_broken).
                [outcomes[index]] = self._compute([item.without_drafts], lambda layers: None)
        return outcomes

    def _prompt_rows(self, batch: RaggedBatch) -> Sequence[PromptRows]:
        if not self._sequences.want_prompt_logprobs:
            return ()
        return prompt_rows(batch.items, batch.first_rows, self.vocab_size)

    def close(self) -> None:
        self._grammars.close()
        del self._pool  # its tensors and arrays keep the memory mapped
        self.memory.close()


def _fail_broken(outcomes: list[SequenceOutcome], batch: RaggedBatch, broken_rows: Bools) -> None:
    """Set the outcome of each sequence with broken rows to SequenceFailed, even if its logits are finite.

    They need not: a chunk that does not end the prompt has no logits, and the last token does not attend to all others
    where there are windows. Nothing of such a chunk may be published, its first blocks neither: what kernels mask they
    multiply by zero, which leaves NaN what it is, so a token that is not finite can spoil those before it in the chunk.
    Where all rows are finite, so is their KV: a token attends to itself, and what is not finite stays in its row to the
    last layer.
    """
    for index, position in batch.first_positions_of(broken_rows).items():
        if isinstance(outcomes[index], SampledTokens):
            outcomes[index] = SequenceFailed(f"the model's hidden states are not finite at position {position}")
