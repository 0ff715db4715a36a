"""What a node asks of an engine. Everything above this line is device- and model-neutral."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvrelay.core.geometry import KVGeometry
from kvrelay.core.kv_pool import KVPool
from kvrelay.core.step import StepPlan, StepResult


class Engine(Protocol):
    """One model and one KV pool. Not thread-safe: ``run`` is always called from one compute thread.

    ``geometry`` is the shape of the pool's blocks, ``max_model_len`` the longest sequence it can compute.
    """

    geometry: KVGeometry
    max_model_len: int
    vocab_size: int

    @property
    def memory(self) -> KVPool:
        """The KV pool, which the engine owns."""

    def run(self, plan: StepPlan, on_layer: Callable[[int], None]) -> StepResult:
        """Compute ``plan`` and sample; an outcome for each sequence.

        Calls ``on_layer(layer)`` as soon as the KV of that layer is in ``memory`` for every scheduled token, in layer
        order; not for sequences that break a limit, and not at all if all do. The KV of the new tokens of a sequence
        that failed is undefined. What one sequence is the cause of (its tokens, its blocks, logits that are not finite,
        sampling parameters) is its own outcome and changes nothing for the others.

        Raises only what it cannot attribute to one sequence. The KV of the new tokens of the whole batch is undefined
        then, and the caller may run the step again, or parts of it.
        """

    def close(self) -> None:
        """Give back the pool's memory and the weights."""
