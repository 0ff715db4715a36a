"""The steps that run on P, and which blocks of them may travel already."""

from __future__ import annotations

from kvrelay.machine.contract import LayersComputed, RunStep, StepDone, StepFailed
from kvrelay.machine.outbox import Outbox
from kvrelay.node.in_flight import PlanInFlight, PlansInFlight
from kvrelay.node.plans import PlanWriter
from kvrelay.protocol.ids import MESSAGER
from kvrelay.protocol.messages.node_to_messager import KVSpan, LayerSignal
from prefill_node.policy import Batch
from prefill_node.request import Holder, PrefillRequest


class Steps:
    """The plans in flight. Each holds the blocks of its requests until the caller has released them."""

    def __init__(self, outbox: Outbox, block_size: int, max_plans_in_flight: int) -> None:
        self._outbox = outbox
        self._block_size = block_size
        self._number = 0
        self.plans = PlanWriter()
        self.in_flight: PlansInFlight[PrefillRequest] = PlansInFlight(max_plans_in_flight)
        self._spans: dict[int, list[tuple[PrefillRequest, KVSpan]]] = {}

    def start(self, batch: Batch) -> None:
        """Compute ``batch``, which is not empty."""
        self._number += 1
        self._spans[self._number] = self._spans_of(batch)
        requests, chunks = [request for request, _ in batch], [chunk for _, chunk in batch]
        for request in requests:
            request.holders.add(Holder.STEP)
        plan = self.plans.write(self._number, [request.sequence for request in requests], chunks)
        self.in_flight.begin(PlanInFlight(plan, requests, chunks, self._outbox.now))
        self._outbox.do(RunStep(plan))

    def _spans_of(self, batch: Batch) -> list[tuple[PrefillRequest, KVSpan]]:
        """Return the blocks that ``batch`` completes, of requests whose KV is to travel."""
        spans = []
        for request, chunk in batch:
            if request.decode_node is not None:
                num_blocks = len(request.sequence.block_table) if chunk.samples else chunk.end // self._block_size
                span = request.take_span(num_blocks)
                spans += [(request, span)] if span else []
        return spans

    def layers_computed(self, event: LayersComputed) -> None:
        """Tell the messager which blocks the step has completed in these layers."""
        spans = [span for request, span in self._spans[event.step] if not request.is_over]
        if spans:
            layers = event.layers
            signal = LayerSignal(step=event.step, layer=layers.start, num_layers=len(layers), spans=spans)
            self._outbox.send(MESSAGER, signal)

    def end(self, event: StepDone | StepFailed) -> PlanInFlight[PrefillRequest]:
        """Return the plan that is answered."""
        ended = self.in_flight.end(event)
        del self._spans[ended.plan.step]
        return ended
