"""The prefill node's state machine."""

from __future__ import annotations

from dataclasses import asdict

import msgspec

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.errors import CorruptKVError, LocalProtocolError, NeverFitsError, QueueFullError, TransferError
from kvrelay.machine.contract import (
    CoreAction,
    Exit,
    KVLoaded,
    KVStaged,
    KVStored,
    LayersComputed,
    Log,
    PeerLost,
    Received,
    SetTimer,
    StepDone,
    StepFailed,
    StopRequested,
    StoreCounted,
    TimerFired,
)
from kvrelay.machine.membership import Membership
from kvrelay.machine.origin import may_send
from kvrelay.machine.outbox import Outbox
from kvrelay.machine.recent import Recent
from kvrelay.machine.unexpected import COUNTER, UnexpectedMessages
from kvrelay.node.plans import Chunk
from kvrelay.protocol.ids import MESSAGER, Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat, Load, Message, NodeAddress
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed
from kvrelay.protocol.messages.messager_to_node import (
    MessagerReady,
    MessagerStats,
    TransferClosed,
    TransferDone,
    TransferFailed,
)
from kvrelay.protocol.messages.node_to_messager import CachedSignal, CloseTransfer, StopMessager
from kvrelay.protocol.messages.node_to_router import (
    Register,
    RequestFailed,
    RequestOutput,
    TokensOut,
)
from kvrelay.protocol.messages.router_to_node import (
    Abort,
    AssignDecode,
    Drain,
    Prefill,
    RegisterAgain,
    Registered,
    RegistrationRefused,
)
from kvrelay.protocol.request import RequestSpec
from kvrelay.protocol.request_limits import RequestLimits
from kvstore.blocks.block_hash import BlockHasher
from kvstore.blocks.kv_cache import KVCache
from prefill_node.admission import Admission
from prefill_node.policy import prefill_policy
from prefill_node.request import Holder, PrefillRequest, PrefillStatus, Reservation
from prefill_node.reservations import Reservations
from prefill_node.steps import Steps
from prefill_node.storage import Storage

HEARTBEAT = "heartbeat"
DRAIN_DEADLINE = "drain deadline"


class PrefillMachine:
    """Computes prompts, moves their KV to decode nodes and gives first tokens to the router.

    It joins the cluster when its messager is up. What it owes: for each Prefill a first token or
    RequestFailed to the router; for each reservation it asked for, a hand-off or a cancellation to D; for each
    request it told its messager of, a CloseTransfer unless the transfer ended by itself.
    """

    def __init__(self, node: NodeConfig, registration: Register, max_plans_in_flight: int = 1) -> None:
        self.kv = KVCache(node.cache.num_blocks, node.cache.prefix_caching)
        self._node = node
        self._block_size = node.cache.block_size
        self._limits = RequestLimits(registration.vocab_size, registration.max_model_len)
        self._hasher = BlockHasher(registration.geometry.model_digest, self._block_size)
        self._outbox = Outbox()
        self._unexpected = UnexpectedMessages(self._outbox)
        self._membership = Membership(registration, node)
        self._policy = prefill_policy(node, self.kv)
        self._admission = Admission(node.scheduler, self.kv, self._policy, self._block_size)
        self._reservations = Reservations(node, self._outbox, self._fail)
        self._steps = Steps(self._outbox, self._block_size, max_plans_in_flight)
        self._storage = Storage(node, registration.geometry.block_bytes, self.kv, self._outbox)
        self._requests: dict[Attempt, PrefillRequest] = {}
        self._running: dict[Attempt, PrefillRequest] = {}
        self._sending: dict[Attempt, PrefillRequest] = {}
        self._ended: Recent[bool] = Recent()
        self._leaving = False
        self._counters = {"steps": 0.0, "prefill_tokens": 0.0, "kv_bytes_sent": 0.0}
        self._messager_stats = MessagerStats(counters={})

    # ------------------------------------------------------------ events

    def handle(self, event: object, now: float) -> list[CoreAction]:
        """Take ``event``; see ``kvrelay.machine.contract``."""
        self._outbox.now = now
        self._on_event(event)
        while len(self._admission) and (request := self._admission.admit(self._here(), now)):
            self._begin(request)
        while self._running and self._steps.in_flight.has_room and self._start_step():
            pass
        if self._leaving and not self._requests and self._storage.transfers.is_idle:
            self._leave()
        return self._outbox.take()

    def _on_event(self, event: object) -> None:
        match event:
            case Received(peer=peer, message=message):
                self._reservations.heard(peer)
                self._membership.heard(peer, self._outbox.now)
                self._on_message(peer, message)
            case LayersComputed():
                self._steps.layers_computed(event)
            case StepDone() | StepFailed():
                self._step_ended(event)
            case KVStaged() | KVStored() | StoreCounted():
                self._storage.transfers.take(event)
            case KVLoaded():
                self._loaded(event)
            case TimerFired(key="heartbeat"):
                self._heartbeat()
            case TimerFired(key="drain deadline"):
                self._fail_all("the node is stopping")
            case TimerFired(key=Attempt() as attempt):
                request = self._requests.get(attempt)
                if request is not None and not request.is_over:
                    self._reservations.overdue(request)
            case PeerLost(peer=peer, reason=reason):
                self._peer_lost(peer, reason)
            case StopRequested():
                self._stop_requested()

    def _on_message(self, peer: PeerId, message: Message) -> None:
        match message:
            case _ if not may_send(peer, message, self._membership):
                self._unexpected.take(peer, message)
            case Prefill(request=spec, decode_node=decode_node):
                self._prefill(msgspec.structs.replace(spec, router=peer), decode_node)
            case (
                Abort(request_id=request_id, epoch=epoch)
                | AssignDecode(request_id=request_id, epoch=epoch)
                | BlocksReserved(request_id=request_id, epoch=epoch)
                | ReservationRefused(request_id=request_id, epoch=epoch)
                | ReservationEnded(request_id=request_id, epoch=epoch)
                | TransferDone(request_id=request_id, epoch=epoch)
                | TransferFailed(request_id=request_id, epoch=epoch)
                | TransferClosed(request_id=request_id, epoch=epoch)
            ):
                self._on_request_message(peer, self._requests.get(Attempt(request_id, epoch)), message)
            case Registered() | RegisterAgain() | RegistrationRefused() | Heartbeat():
                actions, router_changed = self._membership.receive(peer, message, self._outbox.now)
                self._outbox.do(*actions)
                if router_changed:
                    self._abort_all_of(peer)
            case MessagerReady():
                self._outbox.do(*self._membership.join())
                self._set_timer(HEARTBEAT, self._node.cluster.heartbeat_s)
            case MessagerStats():
                self._messager_stats = message
            case Drain():
                self._drain_requested()
            case _:
                self._unexpected.take(peer, message)

    def _on_request_message(self, peer: PeerId, request: PrefillRequest | None, message: Message) -> None:
        match message:
            case TransferDone() if request:
                self._transferred(request, message)
            case TransferFailed(error=error) if request:
                self._transfer_failed(request, error)
            case TransferClosed() if request:
                self._release(request, Holder.MESSAGER)
            case BlocksReserved() | ReservationRefused() | ReservationEnded():
                self._reservations.take_answer(peer, request, message)
            case _ if request is None or request.is_over:
                pass
            case Abort():
                self._close(request, "aborted")
            case AssignDecode(decode_node=decode_node) if request.reservation is Reservation.REFUSED:
                request.decode_node = decode_node
                self._reservations.ask(request, self._requests.values())

    def _set_timer(self, key: str, delay_s: float) -> None:
        self._outbox.do(SetTimer(key, self._outbox.now + delay_s))

    # ------------------------------------------------------------ admission

    def _prefill(self, spec: RequestSpec, decode_node: NodeAddress | None) -> None:
        if spec.attempt in self._requests or self._ended.get(spec.attempt):
            return  # said twice: nobody would take a second answer, nor its KV
        tokens = [*spec.prompt_token_ids, *spec.output_token_ids]
        wrong = self._limits.error(spec)
        error = ErrorInfo.of(wrong) if wrong else self._inadmissible(len(tokens))
        if error is not None:
            self._outbox.send(spec.router, RequestFailed(request_id=spec.request_id, epoch=spec.epoch, error=error))
            return
        request = PrefillRequest(spec, decode_node, self._hasher.hashes(tokens), self._outbox.now)
        request.mark("queued", self._outbox.now)
        self._requests[spec.attempt] = request
        self._admission.add(request, self._outbox.now)

    def _inadmissible(self, num_tokens: int) -> ErrorInfo | None:
        if self._leaving:
            return msgspec.structs.replace(ErrorInfo.of(QueueFullError("the node is leaving")), retryable=True)
        num_blocks = -(-num_tokens // self._block_size)
        if num_blocks > self.kv.num_blocks:
            message = f"{num_tokens} tokens need {num_blocks} KV blocks, {self._node.name} has {self.kv.num_blocks}"
            return ErrorInfo.of(NeverFitsError(message))
        return None

    def _here(self) -> list[PrefillRequest]:
        """Return those that have blocks."""
        return [*self._sending.values(), *self._running.values(), *self._storage.loading.values()]

    def _begin(self, request: PrefillRequest) -> None:
        """``request`` has its blocks: fill them, and have D reserve its own meanwhile."""
        request.holders.add(Holder.REQUEST)
        if request.decode_node is not None:
            request.holders.add(Holder.MESSAGER)
            self._reservations.ask(request, self._requests.values())
        if not self._storage.load(request):
            self._compute(request)

    def _loaded(self, event: KVLoaded) -> None:
        """The store has filled as many blocks as it could: compute the others."""
        request = self._storage.loaded(event)
        if not request.is_over:
            self._admission.publish(request)
            self._compute(request)
        self._release(request, Holder.STORE)

    def _compute(self, request: PrefillRequest) -> None:
        """Compute what is not cached; what is may travel at once."""
        request.lifecycle.move(PrefillStatus.RUNNING_PREFILL, self._outbox.now)
        request.mark("prefill", self._outbox.now)
        self._running[request.attempt] = request
        self._admission.order.ready(request, request.num_remaining_tokens)
        span = None
        if request.decode_node is not None:
            span = request.take_span(request.num_cached_tokens // self._block_size)
        if span is not None:
            self._outbox.send(MESSAGER, CachedSignal(span=span))

    # ------------------------------------------------------------ steps

    def _start_step(self) -> bool:
        """Plan the next step, and return True, if there is anything to compute that is not in flight."""
        order = self._admission.order
        running = order.running(self._running.values(), self._outbox.now)
        batch = self._policy.schedule(running, self._steps.in_flight.chunks(), len(self._sending))
        if batch:
            order.computing(((request, chunk.num_tokens) for request, chunk in batch), self._outbox.now)
            self._steps.start(batch)
        return bool(batch)

    def _step_ended(self, event: StepDone | StepFailed) -> None:
        ended = self._steps.end(event)
        outputs: dict[PeerId, list[RequestOutput]] = {}
        self._counters["steps"] += 1
        for request, chunk, outcome in zip(ended.requests, ended.chunks, ended.outcomes(event), strict=True):
            self._counters["prefill_tokens"] += chunk.num_tokens
            if not request.is_over:
                if isinstance(outcome, SequenceFailed):
                    self._fail(request, ErrorInfo.of(outcome.error))
                elif output := self._computed(request, chunk, outcome):
                    outputs.setdefault(request.spec.router, []).append(output)
            if request not in self._steps.in_flight:
                self._release(request, Holder.STEP)
        for router, its in outputs.items():
            self._outbox.send(router, TokensOut(outputs=its))

    def _computed(self, request: PrefillRequest, chunk: Chunk, sampled: SampledTokens) -> RequestOutput | None:
        """Take a chunk whose KV is good; return the first token if it was the prompt's last."""
        request.sequence.num_computed_tokens = chunk.end
        self._admission.publish(request)
        return self._first_token(request, sampled) if sampled.token_ids else None

    def _first_token(self, request: PrefillRequest, sampled: SampledTokens) -> RequestOutput:
        """The prompt is through: on to D with it, unless its first token ends it."""
        request.mark("first_token", self._outbox.now)
        output = request.take_first_token(sampled)
        if output.finish_reason is not None:
            self._storage.finished(request)
            self._close(request, "finished with its first token")
            return output
        request.lifecycle.move(PrefillStatus.SENDING, self._outbox.now)
        self._sending[request.attempt] = self._running.pop(request.attempt)
        self._admission.prefill_ended(request)
        self._steps.plans.leave(request.sequence)
        self._reservations.hand_off(request)
        # From here on the blocks are kept for the messager, which reads them until D has them all.
        self._release(request, Holder.REQUEST)
        return output

    # ------------------------------------------------------------ endings

    def _transferred(self, request: PrefillRequest, message: TransferDone) -> None:
        request.layers = message.layers
        request.mark("transferred", self._outbox.now)
        self._counters["kv_bytes_sent"] += message.num_bytes
        self._release(request, Holder.MESSAGER)

    def _transfer_failed(self, request: PrefillRequest, error: ErrorInfo) -> None:
        if error.code == CorruptKVError.code:
            self._admission.forget(request)  # else the next attempt would find the same block
        if not request.is_over:
            request.holders.discard(Holder.MESSAGER)
            self._fail(request, error)
        else:
            self._release(request, Holder.MESSAGER)

    def _fail(self, request: PrefillRequest, error: ErrorInfo) -> None:
        failed = RequestFailed(request_id=request.spec.request_id, epoch=request.spec.epoch, error=error)
        self._outbox.send(request.spec.router, failed)
        self._close(request, error.message)

    def _close(self, request: PrefillRequest, reason: str) -> None:
        """End ``request`` as far as anyone outside is concerned; its blocks stay until nobody uses them."""
        self._reservations.cancel(request, reason)
        if Holder.MESSAGER in request.holders:
            close = CloseTransfer(request_id=request.spec.request_id, epoch=request.spec.epoch)
            self._outbox.send(MESSAGER, close)
        self._running.pop(request.attempt, None)
        self._sending.pop(request.attempt, None)
        self._storage.loading.pop(request.attempt, None)
        self._admission.prefill_ended(request)
        request.lifecycle.move(PrefillStatus.CLOSING, self._outbox.now)
        self._release(request, Holder.REQUEST)

    def _release(self, request: PrefillRequest, holder: Holder) -> None:
        """``holder`` no longer uses the blocks; the last one gives them back and ends the request."""
        if request.status is PrefillStatus.ENDED:
            return
        request.holders.discard(holder)
        if request.holders:
            return
        self._steps.plans.leave(request.sequence)
        self.kv.unpin(request.sequence.block_table)
        request.lifecycle.move(PrefillStatus.ENDED, self._outbox.now)
        del self._requests[request.attempt]
        self._ended.note(request.attempt, True)
        self._sending.pop(request.attempt, None)
        self._outbox.send(request.spec.router, request.timeline(self._node.name))

    def _open_requests(self) -> list[PrefillRequest]:
        return [request for request in self._requests.values() if not request.is_over]

    def _fail_all(self, reason: str) -> None:
        for request in self._open_requests():
            self._fail(request, ErrorInfo.of(TransferError(reason)))

    def _abort_all_of(self, router: PeerId) -> None:
        for request in self._open_requests():
            if request.spec.router == router:
                self._close(request, "the router that sent it is gone")

    # ------------------------------------------------------------ peers and timers

    def _heartbeat(self) -> None:
        self._set_timer(HEARTBEAT, self._node.cluster.heartbeat_s)
        for router in self._membership.silent(self._outbox.now):
            self._router_lost(router, "no sign of life")
        self._outbox.do(*self._membership.beat(self.load()))
        self._reservations.renew(self._requests.values())

    def _peer_lost(self, peer: PeerId, reason: str) -> None:
        if peer == MESSAGER:
            self._fail_all(f"the node's cache messager is gone: {reason}")
            self._outbox.do(Log("error", "messager lost", {"reason": reason}), Exit("messager lost"))
        elif self._membership.is_router(peer):
            self._router_lost(peer, reason)
        else:
            self._reservations.lost(peer, reason, self._requests.values())

    def _router_lost(self, router: PeerId, reason: str) -> None:
        """Nobody waits for the requests of ``router`` any more; those of others go on."""
        if self._membership.lost(router):
            self._outbox.do(Log("warning", "router lost", {"router": router, "reason": reason}))
        self._abort_all_of(router)

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
        self._outbox.send(MESSAGER, StopMessager())
        self._outbox.do(Exit("drained"))

    # ------------------------------------------------------------ for people

    def load(self) -> Load:
        """Describe how busy the node is, for heartbeats."""
        prompt_tokens = self._admission.order.tokens_by_length()
        return Load(
            num_waiting=len(self._admission),
            num_running=len(self._running) + len(self._storage.loading),
            num_sending=len(self._sending),
            free_blocks=self.kv.num_free,
            evictable_blocks=self.kv.num_evictable,
            used_blocks=self.kv.num_used,
            queued_tokens=sum(prompt_tokens),
            waiting_tokens=sum(request.num_remaining_tokens for request in self._admission),
            gauges={
                **self._messager_stats.gauges,
                "longest_prompt_wait_s": self._admission.order.longest_wait_s(self._outbox.now),
            },
            counters={
                **self._counters,
                **self._storage.transfers.counters,
                **asdict(self.kv.stats),
                COUNTER: float(self._unexpected.count),
                **self._messager_stats.counters,
            },
            prompt_tokens=prompt_tokens,
            prompt_waits=self._admission.order.waits.report(),
        )

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError unless nothing is running, held or owed."""
        self.kv.assert_quiescent()
        owed = len(self._requests) + len(self._running) + len(self._sending) + self._admission.num_promised
        owed += len(self._admission.order) + len(self._steps.in_flight) + len(self._steps.plans)
        if owed or len(self._admission) or not self._storage.transfers.is_idle:
            histories = {request.attempt: request.lifecycle.history for request in self._requests.values()}
            raise LocalProtocolError(f"prefill node not quiescent: {histories}")
