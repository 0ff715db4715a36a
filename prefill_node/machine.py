"""The prefill node's state machine."""

from __future__ import annotations

from typing import TypeAlias, assert_never

import msgspec

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.errors import CorruptKVError
from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, LayersComputed, StepDone, StepFailed, StoreCounted
from kvrelay.node.in_flight import PlansInFlight
from kvrelay.node.machine import NodeMachine
from kvrelay.node.plans import PlanWriter
from kvrelay.node.request import Holder
from kvrelay.protocol.ids import MESSAGER, Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, Load, Message, NodeAddress
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.protocol.messages.messager_to_node import TransferClosed, TransferDone, TransferFailed
from kvrelay.protocol.messages.node_to_messager import CachedSignal
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.messages.router_to_node import AssignDecode, Prefill
from kvrelay.protocol.request import RequestSpec
from prefill_node.admission import Admission
from prefill_node.endings import PrefillEndings
from prefill_node.policy import prefill_policy
from prefill_node.request import PrefillRequest, PrefillStatus, Reservation
from prefill_node.requests import Requests
from prefill_node.reservations import Reservations
from prefill_node.steps import Steps
from prefill_node.storage import Storage

TransferMessage: TypeAlias = TransferDone | TransferFailed | TransferClosed
"""What the messager tells of a transfer."""

RoleMessage: TypeAlias = (
    Prefill | AssignDecode | BlocksReserved | ReservationRefused | ReservationEnded | TransferMessage
)
"""Messages that prefill nodes take, beside those that all nodes take."""


class PrefillMachine(NodeMachine[PrefillRequest, PrefillStatus]):
    """Computes prompts, moves their KV to decode nodes and gives first tokens to the router.

    It joins the cluster when its messager is up. What it owes: for each Prefill a first token or
    RequestFailed to the router; for each reservation it asked for, a hand-off or a cancellation to D; for each
    request it told its messager of, a CloseTransfer unless the transfer ended by itself.
    """

    requests: Requests
    _endings: PrefillEndings

    def __init__(self, node: NodeConfig, registration: Register, max_plans_in_flight: int = 1) -> None:
        super().__init__(node, registration)
        kv, outbox, block_size = self.kv, self._outbox, node.cache.block_size
        plans: PlanWriter = PlanWriter()
        in_flight: PlansInFlight[PrefillRequest] = PlansInFlight(max_plans_in_flight)
        policy = prefill_policy(node, kv)
        self.requests = Requests(node.scheduler, kv, block_size)
        self._endings = PrefillEndings(node.name, self.requests, kv, plans, in_flight, outbox)
        self._admission = Admission(kv, block_size, self.requests, policy)
        self._reservations = Reservations(node, kv, self.requests, self._endings, outbox)
        self._storage = Storage(node, registration.geometry.block_bytes, kv, self.requests, outbox)
        self._transfers = self._storage.transfers
        self._steps = Steps(
            node,
            policy,
            plans,
            in_flight,
            self.requests,
            self._endings,
            self._admission,
            self._reservations,
            self._storage,
            outbox,
        )
        self._kv_bytes_sent = 0.0

    # ------------------------------------------------------------ events

    def _start_steps(self) -> None:
        while self.requests.queued and (request := self._admission.admit(self._outbox.now)):
            self._begin(request)
        self._steps.start()

    def _step_ended(self, event: StepDone | StepFailed) -> None:
        self._steps.ended(event)

    def _layers_computed(self, event: LayersComputed) -> None:
        self._steps.layers_computed(event)

    def _store_answered(self, event: KVStaged | KVStored | StoreCounted) -> None:
        self._transfers.take(event)

    def _kv_loaded(self, event: KVLoaded) -> None:
        request = self._storage.loaded(event)
        if not request.is_over:
            self._admission.publish(request)
            self._compute(request)
        self._endings.release(request, Holder.STORE)

    def _deadline_over(self, attempt: Attempt) -> None:
        request = self.requests.find(attempt)
        if request is not None and not request.is_over:
            self._reservations.overdue(request)

    def _take(self, peer: PeerId, message: Message) -> None:
        if not isinstance(message, RoleMessage):
            self._unexpected.take(peer, message)
            return
        match message:
            case Prefill(request=spec, decode_node=decode_node):
                self._prefill(msgspec.structs.replace(spec, router=peer), decode_node)
            case BlocksReserved() | ReservationRefused() | ReservationEnded():
                request = self.requests.find(Attempt(message.request_id, message.epoch))
                self._reservations.take_answer(peer, request, message)
            case AssignDecode(decode_node=decode_node):
                request = self.requests.find(Attempt(message.request_id, message.epoch))
                if request is not None and not request.is_over and request.reservation is Reservation.REFUSED:
                    request.decode_node = decode_node
                    self._reservations.ask(request)
            case TransferDone() | TransferFailed() | TransferClosed():
                request = self.requests.find(Attempt(message.request_id, message.epoch))
                if request is not None:
                    self._on_transfer_message(request, message)
            case _:
                assert_never(message)

    def _on_transfer_message(self, request: PrefillRequest, message: TransferMessage) -> None:
        match message:
            case TransferDone(num_bytes=num_bytes, layers=layers):
                request.layers = layers
                self._endings.stages.transferred(request, message.link, num_bytes, layers)
                request.mark("transferred", self._outbox.now)
                self._kv_bytes_sent += num_bytes
            case TransferFailed(error=error):
                request.holders.discard(Holder.MESSAGER)
                if error.code == CorruptKVError.code:
                    self._admission.withdraw(request)  # else the next attempt would find the same block
                if not request.is_over:
                    self._endings.fail(request, error)
            case TransferClosed():
                pass
            case _:
                assert_never(message)
        self._endings.release(request, Holder.MESSAGER)

    # ------------------------------------------------------------ prompts

    def _prefill(self, spec: RequestSpec, decode_node: NodeAddress | None) -> None:
        """Queue a request of a router. A known attempt is ignored: it gets one answer, and its KV is sent once."""
        known = self.requests.find(spec.attempt) is not None or self._endings.has_ended(spec.attempt)
        tokens = [*spec.prompt_token_ids, *spec.output_token_ids]
        if not known and self._admits(spec, tokens):
            request = PrefillRequest(spec, decode_node, self._hasher.hashes(tokens), self._outbox.now)
            request.mark("queued", self._outbox.now)
            self.requests.add(request)

    def _begin(self, request: PrefillRequest) -> None:
        """Fill the blocks that ``request`` has just got, and have D reserve its own meanwhile."""
        if request.decode_node is not None:
            request.holders.add(Holder.MESSAGER)
            self._reservations.ask(request)
        if not self._storage.load(request):
            self._compute(request)

    def _compute(self, request: PrefillRequest) -> None:
        """Compute what is not cached, and have the messager send what is."""
        self.requests.move(request, PrefillStatus.RUNNING_PREFILL, self._outbox.now)
        request.mark("prefill", self._outbox.now)
        span = None
        if request.decode_node is not None:
            span = request.take_span(request.num_cached_tokens // self._hasher.block_size)
        if span is not None:
            self._outbox.send(MESSAGER, CachedSignal(span=span))

    def _fail(self, request: PrefillRequest, error: ErrorInfo) -> None:
        self._endings.fail(request, error)

    # ------------------------------------------------------------ decode nodes

    def _record_message(self, peer: PeerId) -> None:
        self._reservations.record_message(peer)

    def _beat_to_nodes(self) -> None:
        self._reservations.renew()

    def _resumed(self, paused_s: float) -> None:
        self._reservations.resumed(paused_s)

    def _node_lost(self, peer: PeerId, reason: str) -> None:
        self._reservations.lost(peer, reason)

    # ------------------------------------------------------------ state for metrics and tests

    def load(self) -> Load:
        """Describe how busy the node is, for heartbeats."""
        requests = self.requests
        prompt_tokens = requests.order.tokens_by_length()
        return Load(
            num_waiting=len(requests.queued),
            num_running=len(requests.running) + len(requests.loading),
            num_sending=len(requests.sending),
            free_blocks=self.kv.num_free,
            evictable_blocks=self.kv.num_evictable,
            used_blocks=self.kv.num_used,
            queued_tokens=sum(prompt_tokens),
            waiting_tokens=sum(request.num_uncomputed_tokens for request in requests.queued),
            gauges={
                **self._messager_stats.gauges,
                "longest_prompt_wait_s": requests.order.longest_wait_s(self._outbox.now),
            },
            counters={**self._steps.counters, "kv_bytes_sent": self._kv_bytes_sent, **self._common_counters()},
            prompt_tokens=prompt_tokens,
            prompt_waits=requests.order.waits.report(),
            histograms=self._endings.stages.report(),
            prefill_tokens_per_s=self._steps.prefill_speed.at(self._outbox.now) or 0.0,
            link_bytes_per_s=self._messager_stats.link_bytes_per_s,
        )
