"""The interface between a node and its engine. Code above it does not depend on the device or the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from kvrelay.kv_pool.interface import KVPool
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.messages.engine import StepPlan, StepResult

OnLayers: TypeAlias = Callable[[range], None]


class EnginePort(Protocol):
    """Takes plans and answers with events. A node's loop therefore never waits for a step.

    ``max_plans_in_flight``: how many plans it takes before the first of them is answered. 2 lets a device begin a step
    while the machine still handles the one before; the later plan then awaits tokens of the earlier one.

    For each plan it posts LayersComputed events, each layer once and in order, as soon as the KV of the layers is in
    the pool for every scheduled token, then StepDone, StepFailed or EngineLost (``kvrelay.machine.contract``). It
    computes and answers plans in the order in which they were submitted. ``ComputeThread`` makes one of a
    ``StepRunner``, ``PipelinedCompute`` of a ``StepPipeline``.
    """

    max_plans_in_flight: int

    def start(self) -> None:
        """Start. Call before the first ``submit``."""

    def submit(self, plan: StepPlan) -> None:
        """Start ``plan`` or queue it. Call from the loop's thread."""

    def stop(self) -> None:
        """Finish the submitted plans and stop."""


class StepRunner(Protocol):
    """Computes one step at a time. ``max_plans_in_flight``: how many plans may be unanswered, this one included."""

    max_plans_in_flight: int

    def run(self, plan: StepPlan, on_layers: OnLayers) -> StepResult:
        """Apply the sequence changes of ``plan``, compute its batch and sample. Return an outcome for each sequence.

        Calls ``on_layers(layers)`` as soon as the KV of these layers is in ``memory`` for every scheduled token, each
        layer once and in order; not for sequences that break a limit, and not at all if all do. The KV of the new
        tokens of a sequence that failed is undefined. What one sequence is the cause of (its tokens, its blocks, logits
        that are not finite, sampling parameters, an exception) is its own outcome and changes nothing for the others.

        Raises only what it cannot attribute to one sequence. Then the KV of the new tokens of the whole batch is
        undefined. DeviceError: the device is broken for good, and so is every later step.
        """


class Engine(StepRunner, Protocol):
    """One model and one KV pool. Not thread-safe: ``run`` is always called from one compute thread.

    ``geometry`` is the shape of the pool's blocks, ``max_model_len`` the longest sequence it can compute.
    """

    geometry: KVGeometry
    max_model_len: int
    vocab_size: int

    @property
    def memory(self) -> KVPool:
        """The KV pool, which the engine owns."""

    def close(self) -> None:
        """Release the pool's memory and the weights, also if the device is broken."""


class EngineStep(Protocol):
    """One plan of a ``PipelinedEngine``. Both methods are called once, and for each step in the order of the plans."""

    def launch(self) -> None:
        """Have the device compute it after the steps before it, as far as that can be told yet. Raises nothing."""

    def finish(self, on_layers: OnLayers) -> StepResult:
        """Wait for it; what ``on_layers`` is told, what is returned and raised are those of ``Engine.run``.

        May be called while ``launch`` still runs: layers are told as they are ready.
        """


@runtime_checkable
class StepPipeline(Protocol):
    """Launches steps while the device computes earlier ones. ``max_plans_in_flight`` is that of ``EnginePort``."""

    max_plans_in_flight: int

    def begin(self, plan: StepPlan) -> EngineStep:
        """Return the step of ``plan``. ``max_plans_in_flight`` may be begun and not finished. Raises nothing."""


class PipelinedEngine(Engine, StepPipeline, Protocol):
    """An engine whose device may have the next step to compute while it computes one."""
