"""The step that runs on P, and which blocks of it may travel already."""

from __future__ import annotations

from kvrelay.core.ids import MESSAGER
from kvrelay.core.machine import RunStep
from kvrelay.core.messages.node_to_messager import KVSpan, LayerSignal
from kvrelay.core.outbox import Outbox
from kvrelay.core.step import StepPlan
from prefill_node.policy import Batch
from prefill_node.request import Holder, PrefillRequest


class Steps:
    """At most one step at a time. A step holds the blocks of its requests until the caller has ended it."""

    def __init__(self, outbox: Outbox, block_size: int) -> None:
        self._outbox = outbox
        self._block_size = block_size
        self._number = 0
        self._batch: Batch = []
        self._spans: list[tuple[PrefillRequest, KVSpan]] = []

    @property
    def is_running(self) -> bool:
        """Whether a step runs now."""
        return bool(self._batch)

    def start(self, batch: Batch) -> None:
        """Run ``batch``, unless it is empty."""
        if not batch:
            return
        self._number += 1
        self._batch = batch
        for request, chunk in batch:
            request.holders.add(Holder.STEP)
            if request.decode_node is not None:
                end = chunk.start + chunk.num_tokens
                num_blocks = len(request.sequence.block_table) if chunk.samples else end // self._block_size
                span = request.take_span(num_blocks)
                self._spans += [(request, span)] if span else []
        self._outbox.do(RunStep(StepPlan(self._number, [chunk for _, chunk in batch])))

    def layer_computed(self, layer: int) -> None:
        """Tell the messager which blocks the running step has completed in ``layer``."""
        spans = [span for request, span in self._spans if not request.is_over]
        if spans:
            self._outbox.send(MESSAGER, LayerSignal(step=self._number, layer=layer, spans=spans))

    def end(self) -> Batch:
        """Return what the step was of; none runs any more."""
        batch, self._batch, self._spans = self._batch, [], []
        return batch
