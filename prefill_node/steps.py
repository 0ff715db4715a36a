"""The steps of P: what they compute, which of their blocks may travel, and the first tokens they sample."""

from __future__ import annotations

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.machine.contract import LayersComputed, RunStep, StepDone, StepFailed
from kvrelay.machine.outbox import Outbox
from kvrelay.machine.speed import Speed
from kvrelay.node.in_flight import PlanInFlight, PlansInFlight
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.node.request import Holder
from kvrelay.protocol.ids import MESSAGER, PeerId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed
from kvrelay.protocol.messages.node_to_messager import KVSpan, LayerSignal
from kvrelay.protocol.messages.node_to_router import RequestOutput, TokensOut
from prefill_node.admission import Admission
from prefill_node.endings import PrefillEndings
from prefill_node.policy import Batch, PrefillPolicy
from prefill_node.request import PrefillRequest, PrefillStatus
from prefill_node.requests import Requests
from prefill_node.reservations import Reservations
from prefill_node.storage import Storage


class Steps:
    """Plans steps as long as the engine takes more. ``counters`` only grow."""

    def __init__(
        self,
        node: NodeConfig,
        policy: PrefillPolicy,
        plans: PlanWriter,
        in_flight: PlansInFlight[PrefillRequest],
        requests: Requests,
        endings: PrefillEndings,
        admission: Admission,
        reservations: Reservations,
        storage: Storage,
        outbox: Outbox,
    ) -> None:
        self._block_size = node.cache.block_size
        self._policy = policy
        self._plans = plans
        self._in_flight = in_flight
        self._requests = requests
        self._endings = endings
        self._admission = admission
        self._reservations = reservations
        self._storage = storage
        self._outbox = outbox
        self._number = 0
        self._last_ended_s = 0.0
        self._spans: dict[int, list[tuple[PrefillRequest, KVSpan]]] = {}
        self.counters = dict.fromkeys(
            ("steps", "prefill_tokens", "first_tokens", "finished_stop", "finished_length"), 0.0
        )
        self.prefill_speed = Speed()
        """Prompt tokens computed per second of a step."""

    # ------------------------------------------------------------ starting

    def start(self) -> None:
        """Plan as many steps as the engine takes, as long as there is anything to compute that is not in flight."""
        requests, now = self._requests, self._outbox.now
        while requests.running and self._in_flight.has_room:
            running = requests.order.running(requests.running, now)
            batch = self._policy.schedule(running, self._in_flight.chunks(), len(requests.sending))
            if not batch:
                return
            requests.order.computing(((request, chunk.num_tokens) for request, chunk in batch), now)
            self._submit(batch)

    def _submit(self, batch: Batch) -> None:
        self._number += 1
        self._spans[self._number] = self._spans_of(batch)
        requests, chunks = [request for request, _ in batch], [chunk for _, chunk in batch]
        plan = self._plans.write(self._number, requests, chunks)
        self._in_flight.begin(PlanInFlight(plan, requests, chunks, self._outbox.now))
        self._outbox.do(RunStep(plan))

    def _spans_of(self, batch: Batch) -> list[tuple[PrefillRequest, KVSpan]]:
        """Return the blocks that ``batch`` completes, of requests whose KV is to travel."""
        spans = []
        for request, chunk in batch:
            if request.decode_node is not None:
                num_blocks = len(request.block_table) if chunk.samples else chunk.end // self._block_size
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

    # ------------------------------------------------------------ results

    def ended(self, event: StepDone | StepFailed) -> None:
        """Take the outcome of each sequence; each router gets the first tokens that are its own in one message."""
        ended = self._in_flight.end(event)
        del self._spans[ended.plan.step]
        self._measure(event, ended)
        outputs: dict[PeerId, list[RequestOutput]] = {}
        self.counters["steps"] += 1
        for request, chunk, outcome in zip(ended.requests, ended.chunks, ended.outcomes(event), strict=True):
            self.counters["prefill_tokens"] += chunk.num_tokens
            if request.is_over:
                self._endings.end_if_unused(request)
            elif isinstance(outcome, SequenceFailed):
                self._endings.fail(request, ErrorInfo.of(outcome.error))
            elif output := self._computed(request, chunk, outcome):
                outputs.setdefault(request.spec.router, []).append(output)
        for router, its in outputs.items():
            self._outbox.send(router, TokensOut(outputs=its))

    def _measure(self, event: StepDone | StepFailed, ended: PlanInFlight[PrefillRequest]) -> None:
        """Note how fast prompts were computed. A step that failed may have failed at once, and is no measure."""
        if isinstance(event, StepDone):
            num_tokens = sum(chunk.num_tokens for chunk in ended.chunks)
            self.prefill_speed.add(num_tokens, ended.seconds(self._last_ended_s, self._outbox.now), self._outbox.now)
        self._last_ended_s = self._outbox.now

    def _computed(self, request: PrefillRequest, chunk: Chunk, sampled: SampledTokens) -> RequestOutput | None:
        """Take a chunk whose KV is good; return the first token if it was the prompt's last chunk."""
        request.num_computed_tokens = chunk.end
        self._admission.publish(request)
        for message in request.prompt_logprobs_out(sampled) if sampled.prompt_logprobs else ():
            self._outbox.send(request.spec.router, message)
        return self._first_token(request, sampled) if sampled.token_ids else None

    def _first_token(self, request: PrefillRequest, sampled: SampledTokens) -> RequestOutput:
        """Hand the request to D, unless its first token ends it. Only the messager uses the blocks then."""
        request.mark("first_token", self._outbox.now)
        output = request.take(sampled)
        request.prompt_computed()
        self.counters["first_tokens"] += len(output.token_ids)
        if output.finish_reason is not None:
            self.counters[f"finished_{output.finish_reason}"] += 1
            self._storage.finished(request)
            self._endings.close(request, "finished with its first token")
            return output
        self._requests.move(request, PrefillStatus.SENDING, self._outbox.now)
        self._plans.leave(request)
        self._reservations.hand_off(request)
        self._endings.release(request, Holder.REQUEST)
        return output
