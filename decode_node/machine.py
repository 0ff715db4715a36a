"""The state machine of the decode node and of the mixed node."""

from __future__ import annotations

from typing import TypeAlias, assert_never

import msgspec

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from decode_node.reservations import Reservations
from decode_node.resume_policy import ReloadPolicy
from decode_node.scheduler import Scheduler
from decode_node.steps import Steps
from decode_node.storage import SaveOwner, Storage
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, LayersComputed, StepDone, StepFailed, StoreCounted
from kvrelay.node.endings import Endings, LastStatuses
from kvrelay.node.machine import NodeMachine
from kvrelay.node.request import Holder
from kvrelay.protocol.ids import Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, Load, Message
from kvrelay.protocol.messages.messager_to_node import KVArrived, KVCancelled, KVExpected, KVFailed, MessagerReady
from kvrelay.protocol.messages.node_to_messager import CancelKV
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation, HandOff, RenewReservations, ReserveBlocks
from kvrelay.protocol.messages.router_to_node import Generate, PrefillNodes
from kvrelay.protocol.request import RequestSpec
from kvstore.offload.kv_offloader import KVOffloader

RequestMessage: TypeAlias = CancelReservation | KVExpected | KVArrived | KVFailed | KVCancelled
"""Messages about one request that the node knows."""

RoleMessage: TypeAlias = Generate | PrefillNodes | ReserveBlocks | HandOff | RenewReservations | RequestMessage
"""Messages that decode and mixed nodes take, beside those that all nodes take."""

_LAST = LastStatuses(DecodeStatus.CLOSING, DecodeStatus.ENDED)


class DecodeMachine(NodeMachine[DecodeRequest, DecodeStatus]):
    """Takes requests over from P, or whole from the router (mixed), and decodes them.

    A mixed node joins the cluster when it is started, a decode node when its messager is up. What it owes: to P an
    answer to each reservation it asks for; to the router, for each request handed off or sent here, all its tokens and
    one that finishes it, or RequestFailed.
    """

    requests: Requests

    def __init__(self, node: NodeConfig, registration: Register, max_plans_in_flight: int = 1) -> None:
        super().__init__(node, registration)
        outbox, kv = self._outbox, self.kv
        offloader: KVOffloader[SaveOwner] = KVOffloader(node.storage, registration.geometry.block_bytes, kv, outbox)
        reload_policy = ReloadPolicy(node.storage, node.cache.block_size)
        self.requests = Requests(node.scheduler, kv, node.cache.block_size)
        self.scheduler = scheduler = Scheduler(
            node.scheduler,
            node.speculative,
            kv,
            self._hasher,
            self.requests,
            reload_policy,
            offloader,
            max_plans_in_flight,
        )
        self._endings = Endings(
            node.name, self.requests, _LAST, CancelKV, kv, scheduler.plans, scheduler.in_flight, outbox
        )
        self._reservations = Reservations(
            node, kv, self.requests, self._endings, scheduler.admission, scheduler.publisher, outbox
        )
        self._storage = Storage(
            node, self.requests, self._endings, scheduler.publisher, offloader, reload_policy, outbox
        )
        self._transfers = self._storage.transfers
        self._steps = Steps(node, scheduler, self.requests, self._endings, self._storage, reload_policy, outbox)

    # ------------------------------------------------------------ events

    def _start_steps(self) -> None:
        self._steps.start()

    def _step_ended(self, event: StepDone | StepFailed) -> None:
        self._steps.ended(event)

    def _layers_computed(self, event: LayersComputed) -> None:
        raise LocalProtocolError("a decode node does not ask for computed layers")

    def _store_answered(self, event: KVStaged | KVStored | StoreCounted) -> None:
        self._storage.take(event)

    def _kv_loaded(self, event: KVLoaded) -> None:
        self._storage.loaded(event)

    def _take(self, peer: PeerId, message: Message) -> None:
        if not isinstance(message, RoleMessage):
            self._unexpected.take(peer, message)
            return
        match message:
            case Generate(request=spec):
                self._generate(msgspec.structs.replace(spec, router=peer))
            case PrefillNodes(peers=peers):
                self._reservations.introduce(peer, peers)
            case ReserveBlocks(num_tokens=num_tokens):
                self._reservations.reserve(peer, message, self._inadmissible(num_tokens))
            case HandOff(request=spec):
                self._reservations.hand_off(peer, message, self._limits.error(spec))
            case RenewReservations(attempts=attempts):
                self._reservations.renew(peer, attempts)
            case CancelReservation() | KVExpected() | KVArrived() | KVFailed() | KVCancelled():
                request = self.requests.find(Attempt(message.request_id, message.epoch))
                if request is not None:
                    self._on_request_message(peer, request, message)
            case _:
                assert_never(message)

    def _on_request_message(self, peer: PeerId, request: DecodeRequest, message: RequestMessage) -> None:
        match message:
            case KVFailed(error=error):
                self._reservations.kv_failed(request, error)
            case KVCancelled():
                self._endings.release(request, Holder.MESSAGER)
            case CancelReservation():
                # After the hand-off, with all its KV here, it is not P's to cancel.
                if peer == request.sender and request.is_reserved:
                    self._endings.close(request, message.reason)
            case KVExpected():
                if request.status is DecodeStatus.RESERVING:
                    self._reservations.expected(request)
            case KVArrived(num_bytes=num_bytes):
                if not request.is_over:
                    self._reservations.arrived(request, num_bytes)
            case _:
                assert_never(message)

    # ------------------------------------------------------------ requests and peers

    def _generate(self, spec: RequestSpec) -> None:
        tokens = [*spec.prompt_token_ids, *spec.output_token_ids]
        if self.requests.find(spec.attempt) is None and self._admits(spec, tokens):
            request = DecodeRequest(spec, self._hasher.hashes(tokens), DecodeStatus.WAITING, self._outbox.now)
            request.mark("queued", self._outbox.now)
            self.requests.add(request)

    def _fail(self, request: DecodeRequest, error: ErrorInfo) -> None:
        self._reservations.give_up(request, error)

    def _messager_ready(self, message: MessagerReady) -> None:
        self._reservations.link = message.link

    def _record_message(self, peer: PeerId) -> None:
        self._reservations.record_message(peer)

    def _beat_to_nodes(self) -> None:
        self._reservations.heartbeat()
        if self._reservations.refused_a_stranger:
            self._reservations.refused_a_stranger = False
            self._membership.register_again()  # the answer names the prefill nodes

    def _resumed(self, paused_s: float) -> None:
        self._reservations.resumed(paused_s)

    def _router_lost(self, router: PeerId, reason: str) -> None:
        super()._router_lost(router, reason)
        self._reservations.router_lost(router)

    def _node_lost(self, peer: PeerId, reason: str) -> None:
        self._reservations.lost(peer, reason)

    # ------------------------------------------------------------ state for metrics and tests

    def load(self) -> Load:
        """Describe how busy the node is, for heartbeats."""
        scheduler, requests = self.scheduler, self.requests
        waiting, headroom_blocks = list(requests.waiting), scheduler.admission.headroom_blocks()
        prompt_tokens = requests.order.tokens_by_length()
        preemptions = scheduler.preemption.counts
        return Load(
            num_waiting=len(waiting),
            num_running=len(requests.loading) + len(requests.prefilling) + len(requests.decoding),
            num_receiving=len(requests.receiving),
            free_blocks=self.kv.num_free,
            evictable_blocks=self.kv.num_evictable,
            used_blocks=self.kv.num_used,
            queued_tokens=sum(prompt_tokens),
            waiting_tokens=sum(len(request.token_ids) for request in waiting),
            num_preempted=sum(request.status is DecodeStatus.PREEMPTED for request in waiting),
            headroom_blocks=headroom_blocks,
            gauges={
                **self._messager_stats.gauges,
                "longest_prompt_wait_s": requests.order.longest_wait_s(self._outbox.now),
                "reserve_level": scheduler.reserve.level,
                "headroom_tokens": float(headroom_blocks * self._hasher.block_size),
            },
            counters={
                **self._steps.counters,
                **self._reservations.counters,
                "preemptions": float(sum(preemptions.values())),
                **{f"preemptions_{cause}": float(count) for cause, count in preemptions.items()},
                **self._common_counters(),
            },
            prompt_tokens=prompt_tokens,
            prompt_waits=requests.order.waits.report(),
            histograms=self._endings.stages.report(),
            prefill_tokens_per_s=self._steps.prefill_speed.at(self._outbox.now) or 0.0,
        )
