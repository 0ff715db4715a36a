"""Telling the device to compute steps: it has the pool, the decoder, graphs and what the device keeps of sequences."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvrelay.engine.batch import StepLimits
from kvrelay.engine.decoder import DecoderWeights
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.device.batch import AwaitedTokenError, Batch, BatchAssembler
from kvrelay.engine.device.decoder import Computed, DeviceDecoder
from kvrelay.engine.device.framework import Framework
from kvrelay.engine.device.graphs import StepGraphs
from kvrelay.engine.device.operations import Operations, StepShape
from kvrelay.engine.device.outcomes import outcomes_of
from kvrelay.engine.device.pool import Announce, DevicePool
from kvrelay.engine.device.projections import Projections
from kvrelay.engine.device.prompt_scores import ScoredPiece, add_scores, score_prompts
from kvrelay.engine.device.sequence_rows import SequenceRows
from kvrelay.engine.device.step_buffer import StepBuffer
from kvrelay.engine.device.step_slot import Results, StepSlot
from kvrelay.engine.device.tiles import TileCutter
from kvrelay.engine.prompt_logprobs import PromptRows, prompt_rows
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.errors import DeviceError
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.messages.engine import SequenceOutcome
from kvrelay.protocol.request import TokenLogprobs
from kvrelay.protocol.token_rules import mask_words

_MORE_UPLOAD_WORDS = 1 << 16
"""Words of a step's uploads beside its buffer, before room for them must grow: new blocks, adjusted logits."""


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


class Launched(NamedTuple):
    """A batch that the device computes in ``slot``; the ``results`` are there when it is done.

    ``scored``: log probabilities of prompt tokens.
    """

    batch: Batch
    slot: StepSlot
    results: Results
    scored: Sequence[ScoredPiece] = ()


class StepLauncher:
    """Assembles batches and launches them, from one thread at a time. ``slots``: room for each step in flight.

    ``state`` is held while sequences and what the device keeps of them are read or changed, never for long.
    """

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, memory: KVMemory | DeviceMemory,
        framework: Framework, operations: Operations, projections: Projections, limits: DeviceEngineLimits,
        num_slots: int,
    ) -> None:  # fmt: skip
        self.state = threading.Lock()
        self.stream = framework.stream()
        self._framework, self._operations, self._limits = framework, operations, limits
        self._vocab_size = config.vocab_size
        block_size = memory.geometry.block_size
        max_blocks = memory.geometry.blocks_for(limits.max_model_len)
        rows = SequenceRows(limits.max_num_seqs, max_blocks, limits.num_blocks)
        step_limits = StepLimits(block_size, limits.num_blocks, limits.max_model_len, config.vocab_size)
        self._cutter = TileCutter(operations.tile_rows, operations.room)
        self.assembler = BatchAssembler(step_limits, rows, self._cutter, limits.max_num_batched_tokens)
        with framework.on(self.stream):
            self._tables = framework.zeros((limits.max_num_seqs, max_blocks), "int32")
            last_tokens = framework.zeros((limits.max_num_seqs,), "int32")
            self._masks = framework.zeros((limits.max_num_seqs, mask_words(config.vocab_size)), "int32")
            self.pool = DevicePool(memory, framework, self.stream, digests=limits.digests)
            self._buffer = self._make_buffer(entries=0)
            words = self._buffer.num_words + _MORE_UPLOAD_WORDS
            most = limits.max_num_batched_tokens
            self.slots = [StepSlot(framework, most, words) for _ in range(num_slots)]
        self.decoder = DeviceDecoder(config, weights, operations, projections, self._tables, last_tokens)
        self.capture([])

    def capture(self, shapes: list[StepShape]) -> None:
        """Have steps of ``shapes`` as graphs."""
        arena = self.slots[0].arena
        self.graphs = StepGraphs(
            shapes, self.decoder, self.pool.layers, self._masks, self._framework, self.stream, arena
        )

    def forget_sequences(self) -> None:
        """Treat the device's block tables and last tokens as unknown."""
        with self.state:
            self.assembler.forget_sequences()

    def launch(
        self, items: list[ScheduledSequence], slot: StepSlot, announce: Announce, *, scores_prompts: bool = False
    ) -> Launched:
        """Assemble ``items`` and have the device compute them after all that it was told before.

        ``scores_prompts``: some may want log probabilities of their prompts.
        Raises AwaitedTokenError if that cannot be done yet. After any other exception the device has lost its picture
        of the sequences.
        """
        try:
            slot.arena.clear()
            with self._framework.on(self.stream):
                with self.state:
                    batch = self.assembler.assemble(items)
                    changes = self.assembler.take_table_changes()
                if changes is not None:
                    self._operations.set_entries(self._tables, slot.arena.upload(changes))
                if not batch.items:
                    return Launched(batch, slot, slot.fetch(None, None, False, self.stream))
                wanted = prompt_rows(batch.items, batch.first_rows, self._vocab_size) if scores_prompts else ()
                computed = self._compute(batch, slot, announce, keeps_residual=bool(wanted))
                scored = self._score(wanted, batch, computed, slot)
                return Launched(batch, slot, self._fetch(batch, computed, slot), scored)
        except AwaitedTokenError:
            raise
        except BaseException:
            self.forget_sequences()
            raise

    def _score(
        self, wanted: Sequence[PromptRows], batch: Batch, computed: Computed, slot: StepSlot
    ) -> Sequence[ScoredPiece]:
        if not wanted or computed.residual is None:
            return ()
        first = batch.shape.samples
        return score_prompts(wanted, computed.residual, self.decoder, slot, first, self._vocab_size)

    def _compute(self, batch: Batch, slot: StepSlot, announce: Announce, *, keeps_residual: bool) -> Computed:
        """Tell the device to compute ``batch``; announce its layers. Graphs keep no residual."""
        entries = 0 if batch.adjustments is None else len(batch.adjustments.tokens)
        graph = None if keeps_residual else self.graphs.find(batch.shape, entries)
        buffer = self._eager_buffer(entries) if graph is None else graph.buffer
        self.assembler.fill(buffer, slot.arena, batch)
        if batch.masks is not None:
            slot.arena.copy_to(self._masks[: len(batch.masks.words)], batch.masks.words)
        step = buffer.tensors(batch.shape)
        layers = self.pool.layer_events(batch.slots, announce)
        if graph is not None:
            computed = graph.replay()
        else:
            computed = self.decoder.compute(
                step, self.pool.layers, layers.layer_launched, keeps_residual=keeps_residual
            )
        layers.all_launched()
        return computed

    def _fetch(self, batch: Batch, computed: Computed, slot: StepSlot) -> Results:
        """Start the copies of what is computed to the host: padding of graphs apart."""
        rows, count = batch.shape.rows, batch.shape.samples
        sampled = computed.sampled if count else None
        if sampled is not None:
            sampled = type(sampled)(*(one[:count] for one in sampled))
        broken = computed.broken_rows[:rows] if count < rows else None  # logits tell as much
        return slot.fetch(sampled, broken, batch.samples.num_logprobs is not None, self.stream)

    def _eager_buffer(self, entries: int) -> StepBuffer:
        if entries > self._buffer.entries:
            self._buffer = self._make_buffer(2 * entries)
        return self._buffer

    def _make_buffer(self, entries: int) -> StepBuffer:
        rows, seqs = self._limits.max_num_batched_tokens, self._limits.max_num_seqs
        paged, dense, pieces = self._cutter.most(rows, seqs)
        return StepBuffer(self._framework, StepShape(rows, seqs, paged, rows, dense, pieces), entries, self._masks)

    @contextlib.contextmanager
    def checking_device(self) -> Iterator[None]:
        """After any error, check the device: raise DeviceError if it is broken for good."""
        try:
            yield
        except Exception:
            self._framework.synchronize()
            raise

    def close(self) -> None:
        """Wait for the device, unless it is broken; let go of graphs and pool."""
        with contextlib.suppress(DeviceError):
            self._framework.synchronize()
        del self.graphs
        self.pool.close()


def outcomes(launched: Launched) -> list[SequenceOutcome]:
    """Return the outcome of each sequence of the plan, once the device is done."""
    batch, results = launched.batch, launched.results
    found = outcomes_of(batch, results.tokens, _logprobs(batch, results), results.broken)
    if launched.scored:
        add_scores(found, launched.scored)
    if not batch.failed:
        return found
    computed, places = iter(found), range(len(batch.items) + len(batch.failed))
    return [batch.failed[place] if place in batch.failed else next(computed) for place in places]


def _logprobs(batch: Batch, results: Results) -> Iterator[TokenLogprobs | None] | None:
    """Return for each sampling row its log probabilities, None if nobody asks."""
    wanted = batch.samples.num_logprobs
    if wanted is None or results.top_tokens is None or results.logprobs is None:
        return None
    return (
        None if count is None else TokenLogprobs(values[0], ids[1 : 1 + count], values[1 : 1 + count])
        for count, ids, values in zip(wanted, results.top_tokens.tolist(), results.logprobs.tolist(), strict=True)
    )
