"""The state machine of the decode node and of the mixed node."""

from __future__ import annotations

from dataclasses import asdict

import msgspec

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from decode_node.reservations import Reservations
from decode_node.resume_policy import LoadPolicy
from decode_node.schedule import Scheduler
from decode_node.steps import Steps
from decode_node.storage import Storage
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.errors import LocalProtocolError, NeverFitsError, QueueFullError, TransferError
from kvrelay.machine.contract import (
    CoreAction,
    Exit,
    KVLoaded,
    KVStaged,
    KVStored,
    Log,
    PeerLost,
    Received,
    SetTimer,
    Started,
    StepDone,
    StepFailed,
    StopRequested,
    StoreCounted,
    TimerFired,
)
from kvrelay.machine.membership import Membership
from kvrelay.machine.origin import may_send
from kvrelay.machine.outbox import Outbox
from kvrelay.machine.unexpected import COUNTER, UnexpectedMessages
from kvrelay.protocol.ids import MESSAGER, Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat, Load, Message
from kvrelay.protocol.messages.messager_to_node import (
    KVArrived,
    KVCancelled,
    KVExpected,
    KVFailed,
    MessagerReady,
    MessagerStats,
)
from kvrelay.protocol.messages.node_to_messager import StopMessager
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation, HandOff, RenewReservations, ReserveBlocks
from kvrelay.protocol.messages.router_to_node import (
    Abort,
    Drain,
    Generate,
    RegisterAgain,
    Registered,
    RegistrationRefused,
)
from kvrelay.protocol.request import RequestSpec
from kvrelay.protocol.request_limits import RequestLimits
from kvstore.blocks.block_hash import BlockHasher
from kvstore.blocks.kv_cache import KVCache
from kvstore.offload.kv_offloader import KVOffloader

HEARTBEAT = "heartbeat"
DRAIN_DEADLINE = "drain deadline"


class DecodeMachine:
    """Takes requests over from P, or whole from the router (mixed), and decodes them.

    A mixed node joins the cluster when it is started, a decode node when its messager is up. What it owes: to P an
    answer to each reservation it asks for; to the router, for each request handed off or sent here, all its tokens and
    one that finishes it, or RequestFailed.
    """

    def __init__(self, node: NodeConfig, registration: Register, max_plans_in_flight: int = 1) -> None:
        self.kv = KVCache(node.cache.num_blocks, node.cache.prefix_caching)
        self._node = node
        self._limits = RequestLimits(registration.vocab_size, registration.max_model_len)
        self._hasher = BlockHasher(registration.geometry.model_digest, node.cache.block_size)
        self._outbox = Outbox()
        self._unexpected = UnexpectedMessages(self._outbox)
        offloader = KVOffloader(node.storage, registration.geometry.block_bytes, self.kv, self._outbox)
        loads = LoadPolicy(node.storage, node.cache.block_size)
        self.scheduler = Scheduler(
            node.scheduler, node.speculative, self.kv, self._hasher, offloader, loads, max_plans_in_flight
        )
        self._requests = Requests(node.name, self.scheduler, self._outbox)
        self._reservations = Reservations(node, self.scheduler, self._requests, self._outbox)
        self._storage = Storage(node, self.scheduler, self._requests, offloader, loads, self._outbox)
        self._steps = Steps(node, self.scheduler, self._requests, self._storage, loads, self._outbox)
        self._membership = Membership(registration, node)
        self._leaving = False
        self._messager_stats = MessagerStats(counters={})

    # ------------------------------------------------------------ events

    def handle(self, event: object, now: float) -> list[CoreAction]:
        """Take ``event``; see ``kvrelay.machine.contract``."""
        self._outbox.now = now
        self._on_event(event)
        self._steps.start()
        if self._leaving and not self._requests and self._storage.transfers.is_idle:
            self._leave()
        return self._outbox.take()

    def _on_event(self, event: object) -> None:
        match event:
            case StepDone() | StepFailed():
                self._steps.ended(event)
            case Received(peer=peer, message=message):
                self._reservations.heard(peer)
                self._membership.heard(peer, self._outbox.now)
                if may_send(peer, message, self._membership):
                    self._on_message(peer, message)
                else:
                    self._unexpected.take(peer, message)
            case KVStaged() | KVStored() | StoreCounted():
                self._storage.transfers.take(event)
            case KVLoaded():
                self._storage.loaded(event)
            case TimerFired(key="heartbeat"):
                self._heartbeat()
            case TimerFired(key="drain deadline"):
                self._fail_all("the node is stopping")
            case PeerLost(peer=peer, reason=reason):
                self._peer_lost(peer, reason)
            case Started() if self._node.role == "mixed":
                self._join()
            case StopRequested():
                self._stop_requested()

    def _on_message(self, peer: PeerId, message: Message) -> None:
        match message:
            case Generate(request=spec):
                self._generate(msgspec.structs.replace(spec, router=peer))
            case ReserveBlocks():
                self._reservations.reserve(peer, message, self._inadmissible(message.num_tokens))
            case HandOff():
                self._reservations.hand_off(peer, message, self._limits.error(message.request))
            case RenewReservations(attempts=attempts):
                self._reservations.renew(peer, attempts)
            case (
                Abort(request_id=request_id, epoch=epoch)
                | CancelReservation(request_id=request_id, epoch=epoch)
                | KVExpected(request_id=request_id, epoch=epoch)
                | KVArrived(request_id=request_id, epoch=epoch)
                | KVFailed(request_id=request_id, epoch=epoch)
                | KVCancelled(request_id=request_id, epoch=epoch)
            ):
                request = self._requests.find(Attempt(request_id, epoch))
                if request is not None:
                    self._on_request_message(peer, request, message)
            case Registered() | RegisterAgain() | RegistrationRefused() | Heartbeat():
                actions, router_changed = self._membership.receive(peer, message, self._outbox.now)
                self._outbox.do(*actions)
                if router_changed:
                    self._abort_all_of(peer)
            case MessagerReady(link=link):
                self._reservations.link = link
                self._join()
            case MessagerStats():
                self._messager_stats = message
            case Drain():
                self._drain_requested()
            case _:
                self._unexpected.take(peer, message)

    def _on_request_message(self, peer: PeerId, request: DecodeRequest, message: Message) -> None:
        match message:
            case KVFailed(error=error):
                self._reservations.kv_failed(request, error)
            case KVCancelled():
                request.messager_holds = False
                self._requests.end_if_unused(request)
            case _ if request.is_over:
                pass
            case CancelReservation() if peer != request.sender or not request.is_reserved:
                pass  # handed off, and all its KV is here: it is P's no more
            case Abort() | CancelReservation():
                self._requests.close(request)
            case KVExpected() if request.status is DecodeStatus.RESERVING:
                self._reservations.expected(request)
            case KVArrived(num_bytes=num_bytes):
                self._reservations.arrived(request, num_bytes)

    # ------------------------------------------------------------ whole requests

    def _generate(self, spec: RequestSpec) -> None:
        if self._requests.find(spec.attempt) is not None:
            return
        tokens = [*spec.prompt_token_ids, *spec.output_token_ids]
        wrong = self._limits.error(spec)
        error = ErrorInfo.of(wrong) if wrong else self._inadmissible(len(tokens))
        if error is not None:
            self._requests.report(spec, error)
            return
        request = DecodeRequest(spec, self._hasher.hashes(tokens), DecodeStatus.WAITING, self._outbox.now)
        request.mark("queued", self._outbox.now)
        self._requests.add(request)
        self.scheduler.waiting.add(request)

    def _inadmissible(self, num_tokens: int) -> ErrorInfo | None:
        """Return why no request of ``num_tokens`` would be taken now, whatever is free."""
        if self._leaving:
            leaving = ErrorInfo.of(QueueFullError(f"{self._node.name} is leaving"))
            return msgspec.structs.replace(leaving, retryable=True)
        num_blocks = -(-num_tokens // self._hasher.block_size)
        if num_blocks > self.kv.num_blocks:
            message = f"{num_tokens} tokens need {num_blocks} KV blocks, {self._node.name} has {self.kv.num_blocks}"
            return ErrorInfo.of(NeverFitsError(message))
        return None

    # ------------------------------------------------------------ life of the node

    def _set_timer(self, key: str, delay_s: float) -> None:
        self._outbox.do(SetTimer(key, self._outbox.now + delay_s))

    def _join(self) -> None:
        self._outbox.do(*self._membership.join())
        self._set_timer(HEARTBEAT, self._node.cluster.heartbeat_s)

    def _heartbeat(self) -> None:
        self._set_timer(HEARTBEAT, self._node.cluster.heartbeat_s)
        for router in self._membership.silent(self._outbox.now):
            self._router_lost(router, "no sign of life")
        self._outbox.do(*self._membership.beat(self.load()))
        self._reservations.heartbeat()

    def _peer_lost(self, peer: PeerId, reason: str) -> None:
        if peer == MESSAGER:
            self._fail_all(f"the node's cache messager is gone: {reason}")
            self._outbox.do(Log("error", "messager lost", {"reason": reason}), Exit("messager lost"))
        elif self._membership.is_router(peer):
            self._router_lost(peer, reason)
        else:
            self._reservations.lost(peer, reason)

    def _router_lost(self, router: PeerId, reason: str) -> None:
        """Nobody waits for the requests of ``router`` any more; those of others go on."""
        if self._membership.lost(router):
            self._outbox.do(Log("warning", "router lost", {"router": router, "reason": reason}))
        self._abort_all_of(router)

    def _fail_all(self, reason: str) -> None:
        self._reservations.give_up_all(self._requests.open(), TransferError(reason))

    def _abort_all_of(self, router: PeerId) -> None:
        for request in self._requests.open():
            if request.spec.router == router:
                self._requests.close(request)

    def _drain_requested(self) -> None:
        if not self._leaving:
            self._stop_requested()

    def _stop_requested(self) -> None:
        if self._leaving:
            self._fail_all("the node is stopping")
            return
        self._leaving = True
        self._outbox.do(*self._membership.leave())
        self._set_timer(DRAIN_DEADLINE, self._node.cluster.drain_timeout_s)

    def _leave(self) -> None:
        self._outbox.do(*self._membership.drained())
        if self._node.role != "mixed":
            self._outbox.send(MESSAGER, StopMessager())
        self._outbox.do(Exit("drained"))

    # ------------------------------------------------------------ for people

    def load(self) -> Load:
        """Describe how busy the node is, for heartbeats."""
        scheduler = self.scheduler
        waiting, headroom_blocks = list(scheduler.waiting), scheduler.reserved_blocks()
        prompt_tokens = scheduler.order.tokens_by_length()
        return Load(
            num_waiting=len(waiting),
            num_running=len(scheduler.loading) + len(scheduler.prefilling) + len(scheduler.decoding),
            num_receiving=len(scheduler.receiving),
            free_blocks=self.kv.num_free,
            evictable_blocks=self.kv.num_evictable,
            used_blocks=self.kv.num_used,
            queued_tokens=sum(prompt_tokens),
            waiting_tokens=sum(len(request.token_ids) for request in waiting),
            num_preempted=sum(request.status is DecodeStatus.PREEMPTED for request in waiting),
            headroom_blocks=headroom_blocks,
            gauges={
                **self._messager_stats.gauges,
                "longest_prompt_wait_s": scheduler.order.longest_wait_s(self._outbox.now),
                "reserve_level": scheduler.reserve.level,
                "headroom_tokens": float(headroom_blocks * self._hasher.block_size),
            },
            counters={
                **self._steps.counters,
                **self._reservations.counters,
                **self._storage.transfers.counters,
                "preemptions": float(scheduler.num_preempted),
                **{f"preemptions_{cause}": float(count) for cause, count in scheduler.preemptions.items()},
                **asdict(self.kv.stats),
                COUNTER: float(self._unexpected.count),
                **self._messager_stats.counters,
            },
            prompt_tokens=prompt_tokens,
            prompt_waits=scheduler.order.waits.report(),
        )

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError unless nothing is running, held or owed."""
        self._requests.assert_quiescent()
        if len(self.scheduler.order):
            raise LocalProtocolError(f"{self._node.name} is not quiescent: prompts are still in the prefill order")
        if not self._storage.transfers.is_idle:
            raise LocalProtocolError(f"{self._node.name} is not quiescent: KV is on its way to or from the store")
        self.kv.assert_quiescent()
