"""What the state machines of prefill, decode and mixed nodes have in common."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict
from typing import TypeAlias, assert_never

import msgspec

from kvrelay.config.cluster_config import NodeConfig, Role
from kvrelay.errors import LocalProtocolError, NeverFitsError, QueueFullError, TransferError
from kvrelay.machine.contract import (
    CoreAction,
    CoreEvent,
    DumpWritten,
    EngineLost,
    Exit,
    KVLoaded,
    KVStaged,
    KVStored,
    LayersComputed,
    Log,
    PeerLost,
    PublishKVEvents,
    Received,
    Resumed,
    SetTimer,
    Started,
    StepDone,
    StepFailed,
    StopRequested,
    StoreCounted,
    TimerFired,
)
from kvrelay.machine.laws import Laws, require
from kvrelay.machine.membership import Membership
from kvrelay.machine.origin import may_send
from kvrelay.machine.outbox import Outbox
from kvrelay.machine.self_check import SelfCheck
from kvrelay.machine.unexpected import COUNTER, UnexpectedMessages
from kvrelay.node.dump_requests import DumpRequests
from kvrelay.node.prefix_reports import PrefixReports
from kvrelay.node.role_contract import R, RoleContract, S
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.ids import MESSAGER, Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat, Message
from kvrelay.protocol.messages.messager_to_node import MessagerDumped, MessagerReady, MessagerStats
from kvrelay.protocol.messages.node_to_messager import StopMessager
from kvrelay.protocol.messages.node_to_router import AttemptsHeld, Register
from kvrelay.protocol.messages.router_to_node import (
    Abort,
    Drain,
    Dump,
    RegisterAgain,
    Registered,
    RegistrationRefused,
    ResetPrefixCache,
)
from kvrelay.protocol.request import RequestSpec
from kvrelay.protocol.request_limits import RequestLimits
from kvstore.blocks.kv_cache import KVCache

DRAINED = "drained"
"""Reason of the Exit of a node that has finished its requests: the process ends with status 0."""

STOPPED = "stopped by an operator"
"""As DRAINED, but the process ends with status 3 and is not started again."""

HEARTBEAT = "heartbeat"
DRAIN_DEADLINE = "drain deadline"

CommonMessage: TypeAlias = (
    Registered
    | RegisterAgain
    | RegistrationRefused
    | Heartbeat
    | MessagerReady
    | MessagerStats
    | MessagerDumped
    | Drain
    | Dump
    | Abort
    | ResetPrefixCache
)
"""Messages that every node takes."""


class NodeMachine(RoleContract[R, S]):
    """Takes the events that mean the same on every node: it joins, heartbeats, loses peers and leaves.

    Actions go into ``_outbox``, which also has the time of the event: parts with the outbox read it there, parts that
    only decide get it as ``now``.
    """

    def __init__(self, node: NodeConfig, registration: Register) -> None:
        self.kv = KVCache(registration.num_blocks, node.cache.prefix_caching)
        self._kv_events = self.kv.log_events(node.cache.block_size) if node.kv_events.endpoint is not None else None
        self._node = node
        self._limits = RequestLimits(registration.vocab_size, registration.max_model_len)
        self._hasher = BlockHasher(registration.geometry.model_digest, node.cache.block_size)
        self._outbox = Outbox()
        self._unexpected = UnexpectedMessages(self._outbox)
        self._membership = Membership(registration, node, self._outbox)
        self._prefix_reports = PrefixReports(self.kv, self._outbox)
        self._dumps = DumpRequests(self._outbox, has_messager=node.role is not Role.MIXED)
        self._leaving = False
        self._stays_down = False
        self._messager_stats = MessagerStats(counters={})
        self._self_check = SelfCheck(node.cluster.self_check, self.laws_at_rest, self._outbox, self.kv.history.of)

    # ------------------------------------------------------------ events

    def handle(self, event: CoreEvent, now: float) -> list[CoreAction]:
        """Take ``event``; see ``kvrelay.machine.contract``."""
        self._outbox.now = self.kv.history.now = now
        self._on_event(event)
        self._start_steps()
        if self._kv_events:
            self._outbox.do(PublishKVEvents(now, self._kv_events.take()))
        if self._leaving and not self.requests and self._transfers.is_idle:
            self._leave()
        return self._outbox.take()

    def _on_event(self, event: CoreEvent) -> None:
        match event:
            case StepDone() | StepFailed():
                self._step_ended(event)
            case EngineLost(reason=reason):
                self._engine_lost(reason)
            case LayersComputed():
                self._layers_computed(event)
            case Received(peer=peer, message=message):
                self._record_message(peer)
                self._membership.record_message(peer)
                self._on_message(peer, message)
            case KVStaged() | KVStored() | StoreCounted():
                self._store_answered(event)
            case KVLoaded():
                self._kv_loaded(event)
            case TimerFired(key=key):
                self._timer_fired(key)
            case PeerLost(peer=peer, reason=reason):
                self._peer_lost(peer, reason)
            case Started() | Resumed() | StopRequested() | DumpWritten():
                self._on_process_event(event)
            case _:
                assert_never(event)

    def _on_process_event(self, event: Started | Resumed | StopRequested | DumpWritten) -> None:
        match event:
            case Started():
                if self._node.role is Role.MIXED:  # the others join when their messager is ready
                    self._join()
            case Resumed(paused_s=paused_s):
                self._membership.resumed(paused_s)
                self._resumed(paused_s)
            case StopRequested():
                self._stop_requested()
            case DumpWritten():
                self._dumps.written(event)
            case _:
                assert_never(event)

    def _timer_fired(self, key: Hashable) -> None:
        match key:
            case "heartbeat":
                self._heartbeat()
            case "drain deadline":
                self._fail_all("the node is stopping")
            case Attempt():
                self._deadline_over(key)
            case _:
                raise LocalProtocolError(f"no timer is called {key!r}")

    # ------------------------------------------------------------ messages

    def _on_message(self, peer: PeerId, message: Message) -> None:
        if not may_send(peer, message, self._membership):
            self._unexpected.take(peer, message)
        elif isinstance(message, CommonMessage):
            self._on_common_message(peer, message)
        else:
            self._take(peer, message)

    def _on_common_message(self, peer: PeerId, message: CommonMessage) -> None:
        match message:
            case Registered():
                self._registered(peer, message)
            case RegisterAgain() | RegistrationRefused() | Heartbeat():
                self._membership.receive(peer, message)
            case MessagerReady() | MessagerStats() | MessagerDumped():
                self._on_messager_message(message)
            case Dump():
                self._dumps.write(peer, message)
            case Drain(stay_down=stay_down):
                self._stays_down |= stay_down
                if not self._leaving:
                    self._stop_requested()
            case Abort(request_id=request_id, epoch=epoch):
                request = self.requests.find(Attempt(request_id, epoch))
                if request is not None and not request.is_over:
                    self._endings.close(request, "aborted")
            case ResetPrefixCache(reset=reset):
                self._prefix_reports.reset(peer, reset)
            case _:
                assert_never(message)

    def _registered(self, router: PeerId, message: Registered) -> None:
        is_new = router not in self._membership.routers
        if self._membership.registered(router, message.router_incarnation):
            self._close_all_of(router)
        self._prefix_reports.registered(router, wanted=message.wants_prefixes)
        held = [request.attempt for request in self._open_of(router)] if is_new and message.wants_attempts else []
        if held:
            self._outbox.send(router, AttemptsHeld(attempts=held))

    def _on_messager_message(self, message: MessagerReady | MessagerStats | MessagerDumped) -> None:
        match message:
            case MessagerReady():
                self._messager_ready(message)
                if not self._membership.has_joined:
                    self._join()
            case MessagerStats():
                self._messager_stats = message
            case MessagerDumped():
                self._dumps.written(message)
            case _:
                assert_never(message)

    # ------------------------------------------------------------ requests

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

    def _admits(self, spec: RequestSpec, tokens: list[int]) -> bool:
        """Return whether a request with ``tokens`` is taken from its router; if not, tell the router why."""
        wrong = self._limits.error(spec)
        error = ErrorInfo.of(wrong) if wrong else self._inadmissible(len(tokens))
        if error is not None:
            self._endings.report(spec, error)
        return error is None

    def _fail_all(self, reason: str) -> None:
        for request in self.requests.open():
            self._fail(request, ErrorInfo.of(TransferError(reason)))

    def _close_all_of(self, router: PeerId) -> None:
        """End the requests of ``router``, which does not wait for them any more; those of others go on."""
        for request in self._open_of(router):
            self._endings.close(request, "the router that sent it is lost")

    def _open_of(self, router: PeerId) -> list[R]:
        """Return the requests of ``router`` that are not over."""
        return [request for request in self.requests.open() if request.spec.router == router]

    # ------------------------------------------------------------ routers and peers

    def _set_timer(self, key: str, delay_s: float) -> None:
        self._outbox.do(SetTimer(key, self._outbox.now + delay_s))

    def _join(self) -> None:
        self._membership.join()
        self._set_timer(HEARTBEAT, self._node.cluster.heartbeat_s)

    def _heartbeat(self) -> None:
        self._set_timer(HEARTBEAT, self._node.cluster.heartbeat_s)
        for router in self._membership.silent():
            self._router_lost(router, "no heartbeat")
        self._membership.beat(self.load())
        self._prefix_reports.report(self._membership.routers)
        self._endings.remind_messager(self._node.cluster.heartbeat_s)
        self._beat_to_nodes()
        self._self_check.beat(self._activity())

    def _peer_lost(self, peer: PeerId, reason: str) -> None:
        if peer == MESSAGER:
            self._fail_all(f"the node's cache messager is lost: {reason}")
            self._outbox.do(Log("error", "messager lost", {"reason": reason}), Exit("messager lost"))
        elif self._membership.is_router(peer):
            self._router_lost(peer, reason)
        else:
            self._node_lost(peer, reason)

    def _engine_lost(self, reason: str) -> None:
        self._fail_all(f"the node's device is lost: {reason}")
        self._outbox.do(Log("error", "device lost", {"reason": reason}), Exit("device lost"))

    def _router_lost(self, router: PeerId, reason: str) -> None:
        if self._membership.lost(router):
            self._outbox.do(Log("warning", "router lost", {"router": router, "reason": reason}))
        self._close_all_of(router)

    # ------------------------------------------------------------ leaving

    def _stop_requested(self) -> None:
        """Take nothing new and finish what runs; if asked again, fail what runs."""
        if self._leaving:
            self._fail_all("the node is stopping")
            return
        self._leaving = True
        self._membership.leave()
        self._set_timer(DRAIN_DEADLINE, self._node.cluster.drain_timeout_s)

    def _leave(self) -> None:
        self._membership.drained()
        if self._node.role is not Role.MIXED:
            self._outbox.send(MESSAGER, StopMessager())
        self._outbox.do(Exit(STOPPED if self._stays_down else DRAINED))

    # ------------------------------------------------------------ state for metrics and tests

    def _common_counters(self) -> dict[str, float]:
        """Return what every node counts. They only grow."""
        return {
            **self._transfers.counters,
            **self._endings.stages.counters,
            **asdict(self.kv.stats),
            COUNTER: float(self._unexpected.count),
            **self._self_check.counters,
            **self._messager_stats.counters,
        }

    def laws_at_rest(self) -> Laws:
        """Check that nothing is running, held or owed, and that every block is accounted for."""
        yield from self._endings.laws_at_rest()
        yield from self._transfers.laws_at_rest()
        yield from self.kv.laws_at_rest()
        yield from self.kv.laws()

    def _activity(self) -> int | None:
        """Return how often KV blocks were touched, or None if there is a request or a transfer with the store."""
        return None if self.requests or not self._transfers.is_idle else self.kv.history.num_operations

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError unless nothing is running, held or owed."""
        require(self.laws_at_rest(), f"{self._node.name} is not quiescent")
