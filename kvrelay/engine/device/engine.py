"""The engine that runs a model on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvrelay.engine.batch import StepLimits
from kvrelay.engine.decoder import DecoderWeights
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.device.batch import Batch, BatchAssembler
from kvrelay.engine.device.decoder import Computed, DeviceDecoder
from kvrelay.engine.device.framework import Framework
from kvrelay.engine.device.graphs import StepGraphs, chunk_shapes
from kvrelay.engine.device.operations import Operations, Sampled, StepShape
from kvrelay.engine.device.outcomes import outcomes_of
from kvrelay.engine.device.pool import DevicePool, HostPool
from kvrelay.engine.device.sequence_rows import SequenceRows
from kvrelay.engine.device.step_buffer import StepBuffer
from kvrelay.engine.device.tiles import TileCutter
from kvrelay.engine.isolation import OnLayer, compute_isolated
from kvrelay.engine.sequences import EngineSequence, EngineSequences, ScheduledSequence
from kvrelay.errors import EngineError
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import SequenceId
from kvrelay.protocol.messages.engine import NewSequence, SequenceFailed, SequenceOutcome, StepPlan, StepResult
from kvrelay.protocol.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class DeviceEngineLimits:
    """Sizes of the pool and of steps. ``decode_graphs``, ``chunk_graphs``: sizes of steps that are graphs.

    ``device_pool``: the pool is memory of the device, which it always is on a GPU; on a CPU that is simulated.
    ``digests``: this node sends the KV it computes.
    """

    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    decode_graphs: tuple[int, ...] = ()
    chunk_graphs: tuple[int, ...] = ()
    device_pool: bool = False
    digests: bool = False


class DeviceEngine:
    """A decoder with its KV pool on a device (see ``interface.Engine``)."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        geometry: KVGeometry,
        framework: Framework,
        operations: Operations,
        limits: DeviceEngineLimits,
    ) -> None:
        self.geometry = geometry
        self.memory = _make_memory(geometry, limits, framework)
        self.max_model_len = limits.max_model_len
        self.vocab_size = config.vocab_size
        self.max_plans_in_flight = 1
        self._sequences = EngineSequences()
        self._framework = framework
        self._operations = operations
        self._limits = limits
        self._stream = framework.stream()
        max_blocks = geometry.blocks_for(limits.max_model_len)
        self._rows = SequenceRows(limits.max_num_seqs, max_blocks, limits.num_blocks)
        step_limits = StepLimits(geometry.block_size, limits.num_blocks, limits.max_model_len, config.vocab_size)
        self._cutter = TileCutter(operations.tile_rows, operations.room)
        self._assembler = BatchAssembler(step_limits, self._rows, self._cutter, limits.max_num_batched_tokens)
        with framework.on(self._stream):
            self._tables = framework.zeros((limits.max_num_seqs, max_blocks), "int32")
            last_tokens = framework.zeros((limits.max_num_seqs,), "int32")
            self._pool = self._make_pool()
            self._buffer = self._make_buffer(entries=0)
        self._tokens, self._token_staging = framework.staging(limits.max_num_batched_tokens)
        self._broken, self._broken_staging = framework.staging(limits.max_num_batched_tokens)
        self._sampled = framework.event()
        self._decoder = DeviceDecoder(config, weights, framework, operations, self._tables, last_tokens)
        self._graphs = StepGraphs((), self._decoder, self._pool.layers, framework, self._stream)

    def _make_pool(self) -> DevicePool | HostPool:
        if isinstance(self.memory, KVMemory):
            return HostPool(self.memory, self._framework)
        return DevicePool(self.memory, self._framework, self._stream, digests=self._limits.digests)

    def warm_up(self) -> None:
        """Compile what steps need and capture the graphs, so that nothing is compiled while requests wait."""
        self._framework.synchronize()  # weights and tables were made in other streams
        room = self._operations.room
        counts = {1, 2, 300} if room is None else {1, 2, 300, room.fewest}
        for count in {min(count, self._longest_warm_up()) for count in counts}:
            self._compute([_warm_up_item(count, self.geometry)], lambda layer: None)
        self._rows.clear()
        decodes = [StepShape(size, size, 0, size) for size in self._limits.decode_graphs]
        shapes = [*decodes, *chunk_shapes(self._limits.chunk_graphs, self._operations.tile_rows)]
        self._graphs = StepGraphs(shapes, self._decoder, self._pool.layers, self._framework, self._stream)

    def _longest_warm_up(self) -> int:
        room = self._limits.num_blocks * self.geometry.block_size
        return min(room, self._limits.max_model_len, self._limits.max_num_batched_tokens)

    def run(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        if not plan.batch:
            raise EngineError("a step without sequences")
        items = self._sequences.apply(plan)
        outcomes = compute_isolated(plan.step, items, self._compute, on_layer)
        return self._sequences.result(plan, items, outcomes)

    def _compute(self, items: list[ScheduledSequence], on_layer: OnLayer) -> list[SequenceOutcome]:
        """Return the outcome of each of ``items``."""
        try:
            with self._framework.on(self._stream):
                batch = self._assembler.assemble(items)
                outcomes = iter(self._compute_batch(batch, on_layer) if batch.items else ())
        except BaseException:
            self._rows.clear()  # what the device has of their KV is not known any more
            raise
        return [batch.failed[place] if place in batch.failed else next(outcomes) for place in range(len(items))]

    def _compute_batch(self, batch: Batch, on_layer: OnLayer) -> list[SequenceOutcome]:
        """Return the outcome of each of the batch's items."""
        self._update_tables()
        computed, finish = self._launch(batch, on_layer)
        rows, count = batch.shape.rows, batch.shape.samples
        if computed.sampled is not None:
            self._framework.copy(self._token_staging[:count], computed.sampled.tokens[:count])
        if count < rows:
            self._framework.copy(self._broken_staging[:rows], computed.broken_rows[:rows])
        self._sampled.record(self._stream)
        finish()
        self._sampled.synchronize()
        broken = self._broken[:rows] if count < rows else None  # logits tell as much
        outcomes = outcomes_of(batch, self._tokens[:count].tolist(), self._logprobs(batch, computed.sampled), broken)
        for index, item in enumerate(batch.items):
            if item.drafts and isinstance(outcomes[index], SequenceFailed):
                # Perhaps a guess is what is not finite: masked or not, it can spoil the rows before it.
                [outcomes[index]] = self._compute([item.without_drafts], lambda layer: None)
        return outcomes

    def _update_tables(self) -> None:
        changes = self._rows.take_changes()
        if changes is not None:
            self._operations.set_entries(self._tables, self._framework.upload(changes, "int32"))

    def _launch(self, batch: Batch, on_layer: Callable[[int], None]) -> tuple[Computed, Callable[[], None]]:
        """Tell the device to compute ``batch``; return what comes of it, and what announces the rest of the layers."""
        entries = 0 if batch.adjustments is None else len(batch.adjustments.tokens)
        graph = self._graphs.find(batch.shape, entries)
        buffer = self._eager_buffer(entries) if graph is None else graph.buffer
        self._assembler.fill(buffer, batch)
        step = buffer.tensors(batch.shape)
        layers = self._pool.begin_step(batch.slots, on_layer)
        if graph is not None:
            return graph.replay(), layers.finish
        return self._decoder.compute(step, self._pool.layers, layers.layer_launched), layers.finish

    def _eager_buffer(self, entries: int) -> StepBuffer:
        if entries > self._buffer.entries:
            self._buffer = self._make_buffer(2 * entries)
        return self._buffer

    def _make_buffer(self, entries: int) -> StepBuffer:
        rows, seqs = self._limits.max_num_batched_tokens, self._limits.max_num_seqs
        paged, dense, pieces = self._cutter.most(rows, seqs)
        return StepBuffer(self._framework, StepShape(rows, seqs, paged, rows, dense, pieces), entries)

    def _logprobs(self, batch: Batch, sampled: Sampled | None) -> Iterator[TokenLogprobs | None]:
        """Return for each sampling row its log probabilities, if they are asked for."""
        wanted = [sample.item.sequence.sampling.num_logprobs for sample in batch.samples]
        if sampled is None or all(count is None for count in wanted):
            return iter([None] * len(wanted))
        tops, logprobs = (self._framework.to_host(one).tolist() for one in sampled[1:])
        return (
            None if count is None else TokenLogprobs(values[0], ids[1 : 1 + count], values[1 : 1 + count])
            for count, ids, values in zip(wanted, tops, logprobs, strict=False)
        )

    def close(self) -> None:
        self._stream.synchronize()
        del self._graphs
        self._pool.close()
        self.memory.close()


def _make_memory(geometry: KVGeometry, limits: DeviceEngineLimits, framework: Framework) -> KVMemory | DeviceMemory:
    if framework.is_gpu or limits.device_pool:
        return DeviceMemory.create(geometry, limits.num_blocks, "cuda" if framework.is_gpu else "simulated")
    return KVMemory.create(geometry, limits.num_blocks)


def _warm_up_item(num_tokens: int, geometry: KVGeometry) -> ScheduledSequence:
    """Return a sequence whose keys and values count as there already, so that its step writes none."""
    new = NewSequence(
        id=SequenceId(0),
        request_id="warm-up",
        token_ids=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(max_tokens=1, seed=0, temperature=1.0, top_p=0.9, top_k=5, num_logprobs=1),
        block_table=list(range(geometry.blocks_for(num_tokens))),
    )
    return ScheduledSequence(EngineSequence(new), 0, num_tokens, samples=True, writes_from=num_tokens)
