"""The engine that runs a model on a device."""

from __future__ import annotations

import logging
import threading
from collections import deque
from queue import SimpleQueue
from typing import Literal

from kvrelay.engine.decoder import DecoderWeights
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.device.batch import AwaitedTokenError
from kvrelay.engine.device.framework import Framework
from kvrelay.engine.device.graphs import chunk_shapes
from kvrelay.engine.device.launcher import DeviceEngineLimits, Launched, StepLauncher, outcomes
from kvrelay.engine.device.operations import Operations, StepShape
from kvrelay.engine.device.pool import LayersReady
from kvrelay.engine.device.projections import Projections
from kvrelay.engine.device.step_slot import StepSlot
from kvrelay.engine.isolation import Compute, OnLayers, compute_isolated
from kvrelay.engine.sequences import EngineSequence, EngineSequences, ScheduledSequence
from kvrelay.errors import EngineError
from kvrelay.grammar.masks import GrammarMasks
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId, RequestId, SequenceId
from kvrelay.protocol.messages.engine import NewSequence, SequenceFailed, SequenceOutcome, StepPlan, StepResult
from kvrelay.protocol.request import SamplingParams

logger = logging.getLogger(__name__)

PLANS_IN_FLIGHT = 2


class DeviceEngine:
    """A decoder with its KV pool on a device (see ``interface.PipelinedEngine``)."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        geometry: KVGeometry,
        framework: Framework,
        operations: Operations,
        projections: Projections,
        limits: DeviceEngineLimits,
        grammars: GrammarMasks | None = None,
    ) -> None:
        self.geometry = geometry
        self.memory = _make_memory(geometry, limits, framework)
        self.max_model_len = limits.max_model_len
        self.vocab_size = config.vocab_size
        self.max_plans_in_flight = PLANS_IN_FLIGHT
        self._framework = framework
        self._operations = operations
        self._limits = limits
        self.launcher = StepLauncher(
            config, weights, self.memory, framework, operations, projections, limits, PLANS_IN_FLIGHT
        )
        self.grammars = grammars or GrammarMasks(config.vocab_size)
        self._steps = StepQueue(self.launcher, self.grammars)

    def warm_up(self) -> None:
        """Compile all kernels and capture the graphs, so that no request waits for compilation."""
        self._framework.synchronize()  # weights and tables were made in other streams
        room = self._operations.room
        counts = {1, 2, 300} if room is None else {1, 2, 300, room.fewest}
        for count in {min(count, self._longest_warm_up()) for count in counts}:
            slot = self.launcher.slots[0]
            self.launcher.launch([_warm_up_item(count, self.geometry)], slot, lambda layers, event: None)
            slot.done.synchronize()
        self.launcher.forget_sequences()
        decodes = [StepShape(size, size, 0, size) for size in self._limits.decode_graphs]
        self.launcher.capture([*decodes, *chunk_shapes(self._limits.chunk_graphs, self._operations.tile_rows)])

    def compute_largest_step(self) -> None:
        """Compute a prefill of as many tokens as a step may have: nothing takes more memory."""
        longest, left = self._longest_warm_up(), self._limits.max_num_batched_tokens
        items: list[ScheduledSequence] = []
        while left > 0 and len(items) < self._limits.max_num_seqs:
            items.append(_warm_up_item(min(longest, left), self.geometry))
            left -= longest
        slot = self.launcher.slots[0]
        self.launcher.launch(items, slot, lambda layers, event: None)
        slot.done.synchronize()
        self.launcher.forget_sequences()

    def _longest_warm_up(self) -> int:
        room = self._limits.num_blocks * self.geometry.block_size
        return min(room, self._limits.max_model_len, self._limits.max_num_batched_tokens)

    def begin(self, plan: StepPlan) -> DeviceStep:
        return self._steps.begin(plan)

    def run(self, plan: StepPlan, on_layers: OnLayers) -> StepResult:
        """Layers are reported when all have been launched."""
        step = self.begin(plan)
        step.launch()
        return step.finish(on_layers)

    def close(self) -> None:
        self.grammars.close()
        self.launcher.close()
        self.memory.close()


def _make_memory(geometry: KVGeometry, limits: DeviceEngineLimits, framework: Framework) -> KVMemory | DeviceMemory:
    if framework.is_gpu or limits.device_pool:
        kind: Literal["cuda", "simulated"] = "cuda" if framework.is_gpu else "simulated"
        return DeviceMemory.create(geometry, limits.num_blocks, kind, framework.name)
    return KVMemory.create(geometry, limits.num_blocks)


class StepQueue:
    """The steps in flight, in their order, and the engine's own copies of sequences.

    ``launching`` is held by whoever launches. ``deferred`` are the steps that ``finish`` has yet to launch.
    """

    def __init__(self, launcher: StepLauncher, grammars: GrammarMasks) -> None:
        self.launcher = launcher
        self.launching = threading.RLock()
        self.sequences = EngineSequences(grammars)
        self.deferred: deque[DeviceStep] = deque()
        self._count = 0

    def compute_masks(self, items: list[ScheduledSequence]) -> None:
        """Compute what grammars allow ``items`` to sample. Masks are sent with a step, so they must be there first."""
        with self.launcher.state:
            computed = self.sequences.begin_masks(items)
        if computed is not None:
            computed.result()

    def begin(self, plan: StepPlan) -> DeviceStep:
        """Return the next step."""
        self._count += 1
        slots = self.launcher.slots
        return DeviceStep(self, plan, slots[self._count % len(slots)])


class DeviceStep:
    """One plan on its way: ``launch`` tells the device what to compute, ``finish`` waits for it, in any two threads.

    A step is deferred, and launched by ``finish`` when all steps before it are over, if it needs on the host a token
    that is being sampled, if a step before it is deferred, or if launching it raises: then the sequences that break it
    are found one by one.
    """

    def __init__(self, steps: StepQueue, plan: StepPlan, slot: StepSlot) -> None:
        self._steps = steps
        self._launcher = steps.launcher
        self._plan = plan
        self._slot = slot
        self._items: list[ScheduledSequence] = []
        self._launched: Launched | None = None
        self._layers: SimpleQueue[tuple[range, LayersReady] | None] = SimpleQueue()
        self._num_told = 0

    def launch(self) -> None:
        """Raises nothing. An error here occurs again in ``finish``."""
        try:
            with self._steps.launching:
                self._launch_if_possible()
        finally:
            self._layers.put(None)

    def _launch_if_possible(self) -> None:
        try:
            with self._launcher.state:
                self._items = self._steps.sequences.apply(self._plan)
            if self._items and not self._steps.deferred:
                self._steps.compute_masks(self._items)
                self._launched = self._launch(self._items)
        except AwaitedTokenError:
            pass
        except Exception:
            logger.exception("step %d was not launched with %d sequences", self._plan.step, len(self._items))
        if self._launched is None:
            self._steps.deferred.append(self)

    def _launch(self, items: list[ScheduledSequence]) -> Launched:
        return self._launcher.launch(
            items,
            self._slot,
            lambda layers, event: self._layers.put((layers, event)),
            scores_prompts=self._steps.sequences.want_prompt_logprobs,
        )

    def finish(self, on_layers: OnLayers) -> StepResult:
        """Raises DeviceError, and errors that it cannot attribute to one sequence."""
        try:
            with self._launcher.checking_device():
                self._tell_layers(on_layers)
                if self._launched is None:
                    with self._steps.launching:
                        found = self._compute_now(on_layers)
                else:
                    found = self._outcomes(self._launched)
        finally:
            if self._launched is None:
                with self._steps.launching:
                    if self in self._steps.deferred:
                        self._steps.deferred.remove(self)
        with self._launcher.state:
            return self._steps.sequences.result(self._plan, self._items, found)

    def _compute_now(self, on_layers: OnLayers) -> list[SequenceOutcome]:
        """Launch the step and wait for it; if that raises, its halves, and so on."""
        if not self._items:
            raise EngineError("a step without sequences")
        self._steps.compute_masks(self._items)

        def compute(items: list[ScheduledSequence], on_layers: OnLayers) -> list[SequenceOutcome]:
            try:
                launched = self._launch(items)
                self._layers.put(None)
            except BaseException:
                self._layers = SimpleQueue()
                raise
            self._num_told = 0  # of this part of the step; the whole step's are counted by compute_isolated
            self._tell_layers(on_layers)
            return self._outcomes(launched)

        told = self._num_told

        def tell_rest(layers: range) -> None:
            if layers.stop > told:
                on_layers(range(max(told, layers.start), layers.stop))

        return self._isolated(self._items, compute, tell_rest)

    def _isolated(self, items: list[ScheduledSequence], compute: Compute, on_layers: OnLayers) -> list[SequenceOutcome]:
        """Do as ``compute_isolated``, and raise DeviceError if the device is what broke."""
        return compute_isolated(self._plan.step, items, self._launcher.checking_device()(compute), on_layers)

    def _tell_layers(self, on_layers: OnLayers) -> None:
        """Tell layers once they are where others read them, until all are launched."""
        while (group := self._layers.get()) is not None:
            layers, event = group
            event.synchronize()
            on_layers(layers)
            self._num_told = layers.stop

    def _outcomes(self, launched: Launched) -> list[SequenceOutcome]:
        """Return what came of each sequence of ``launched``, when the device is done with it."""
        launched.slot.done.synchronize()
        found = outcomes(launched)
        items = launched.batch.items
        if not any(item.drafts or item.is_missing_token for item in items):
            return found
        places = [place for place in range(len(found)) if place not in launched.batch.failed]
        for place, item in zip(places, items, strict=True):
            if item.is_missing_token:
                found[place] = SequenceFailed(f"no token was sampled for position {item.start}")
            elif item.drafts and isinstance(found[place], SequenceFailed):
                # Perhaps a guess is what is not finite: masked or not, it can spoil the rows before it.
                found[place] = self._without_drafts(item)
        return found

    def _without_drafts(self, item: ScheduledSequence) -> SequenceOutcome:
        """Compute ``item`` once more, alone and without its guesses."""

        def compute(items: list[ScheduledSequence], _: OnLayers) -> list[SequenceOutcome]:
            with self._steps.launching:
                launched = self._launcher.launch(items, self._slot, lambda layers, event: None)
            launched.slot.done.synchronize()
            return outcomes(launched)

        return self._isolated([item.without_drafts], compute, lambda layers: None)[0]


def _warm_up_item(num_tokens: int, geometry: KVGeometry) -> ScheduledSequence:
    """Return a sequence whose keys and values count as there already, so that its step writes none."""
    new = NewSequence(
        id=SequenceId(0),
        request_id=RequestId("warm-up"),
        token_ids=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(max_tokens=1, seed=0, temperature=1.0, top_p=0.9, top_k=5, num_logprobs=1),
        block_table=[BlockId(index) for index in range(geometry.blocks_for(num_tokens))],
    )
    return ScheduledSequence(EngineSequence(new), 0, num_tokens, samples=True, writes_from=num_tokens)
