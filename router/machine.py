"""The router's state machine."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from kvrelay.config.sections import RoutingPolicy
from kvrelay.config.self_check_mode import SelfCheckMode
from kvrelay.errors import LocalProtocolError, NoNodeError
from kvrelay.machine.contract import (
    CoreAction,
    Exit,
    PeerLost,
    Received,
    Resumed,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
)
from kvrelay.machine.laws import require
from kvrelay.machine.self_check import SelfCheck
from kvrelay.machine.unexpected import COUNTER, UnexpectedMessages
from kvrelay.protocol.ids import NodeId, PeerId
from kvrelay.protocol.messages.base import Heartbeat, Message
from kvrelay.protocol.messages.node_to_router import (
    AttemptsHeld,
    DecodeNeeded,
    Drained,
    Dumped,
    Leaving,
    NodeToRouter,
    PrefixCacheChanged,
    PrefixCacheReset,
    PromptLogprobsOut,
    Register,
    RequestFailed,
    RequestPreempted,
    RequestTimeline,
    TokensOut,
)
from router.cache_resets import CacheResets
from router.events import (
    CacheResetRequested,
    CancelRequested,
    ClientGone,
    ClientsFinished,
    DrainRequested,
    DumpReported,
    DumpRequested,
    FinishClients,
    NewRequest,
    NodesFound,
    RegistryLost,
    RouterAction,
    RouterOutbox,
    StopMatched,
    Submitted,
)
from router.expected_nodes import ExpectedNode
from router.followed import FollowedNodes
from router.limits import Limits
from router.node_table import NodeTable
from router.nodes import LIVENESS, Nodes
from router.placement import Placement
from router.policies import POLICIES
from router.request import RequestTimer
from router.requests import Requests

RouterEvent: TypeAlias = (
    Received
    | PeerLost
    | TimerFired
    | Started
    | Resumed
    | StopRequested
    | ClientsFinished
    | Submitted
    | ClientGone
    | CancelRequested
    | StopMatched
    | DrainRequested
    | DumpRequested
    | CacheResetRequested
    | NodesFound
    | RegistryLost
)
RouterMessage: TypeAlias = NodeToRouter | Heartbeat
"""Messages a router accepts from nodes."""

DRAIN = "drain"
"""Key of the drain timer: when it fires, all remaining requests fail."""

LAST_CLIENTS = "last_clients"
"""Key of the timer of ``LAST_CLIENTS_S``."""

LAST_CLIENTS_S = 5.0
"""Seconds a router that stops waits for clients when it has no request: one that does not read might stay for ever."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Settings of the machine. ``model``: the model name that nodes must serve. ``expected_nodes``: see ``NodeTable``.

    Epochs start at ``first_epoch`` + 1. It differs between routers because clients may send equal request ids to two of
    them. ``local_prefill_tokens``: see ``Placement``.
    """

    model: str
    incarnation: str
    first_epoch: int = 0
    prefill_routing: RoutingPolicy = "least_loaded"
    decode_routing: RoutingPolicy = "least_loaded"
    local_prefill_tokens: int | None = None
    heartbeat_s: float = 1.0
    peer_timeout_s: float = 5.0
    drain_timeout_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    expected_nodes: Mapping[NodeId, ExpectedNode] | None = None
    self_check: SelfCheckMode = "report"


class RouterMachine:
    """Handles node messages, client requests and disconnects, and timers; returns actions.

    Every admitted request gets exactly one terminal delivery. At rest nothing remains: ``assert_quiescent``.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self._drain_timeout_s = settings.drain_timeout_s
        self._outbox = RouterOutbox()
        self._unexpected = UnexpectedMessages(self._outbox)
        self._stopping = False
        self._clients_gone = False
        """Whether a router that stops waits for clients no more. What they submit all the same is refused."""
        self._awaits_last_clients = False
        """Whether the timer ``LAST_CLIENTS`` counts; one that was set before the last request does not."""
        decode_alone = settings.local_prefill_tokens is not None
        self.node_table = NodeTable(
            settings.model, settings.peer_timeout_s, decode_alone=decode_alone, expected=settings.expected_nodes
        )
        prefill_routing = POLICIES[settings.prefill_routing](self.node_table, settings.first_epoch)
        decode_routing = POLICIES[settings.decode_routing](self.node_table, settings.first_epoch + 1)
        placement = Placement(self.node_table, prefill_routing, decode_routing, settings.local_prefill_tokens)
        self.requests = Requests(settings.limits, self.node_table, placement, self._outbox, settings.first_epoch)
        self._cache_resets = CacheResets(self.node_table, self._outbox, settings.peer_timeout_s)
        self._self_check = SelfCheck(settings.self_check, self.requests.laws_at_rest, self._outbox)
        self.followed = FollowedNodes(settings.model, self._outbox)
        self._nodes = Nodes(
            self.node_table,
            self.followed,
            self.requests,
            self._outbox,
            incarnation=settings.incarnation,
            wants_prefixes=prefill_routing.uses_prefixes or decode_routing.uses_prefixes,
            heartbeat_s=settings.heartbeat_s,
            peer_timeout_s=settings.peer_timeout_s,
        )

    def handle(self, event: RouterEvent, now: float) -> list[CoreAction | RouterAction]:
        """Handle ``event`` at time ``now`` (seconds); return the actions to perform, in order."""
        self._outbox.now = now
        self._on_event(event)
        if self._stopping:
            self._end_if_done()
        return self._outbox.take()

    def unready_reason(self) -> str | None:
        """Return why this router should get no new requests now, or None. One that stops still takes what comes."""
        return "the router is stopping" if self._stopping else self.node_table.unready_reason()

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError unless no request is held."""
        require(self.requests.laws_at_rest(), "the router is not quiescent")
        require(self._cache_resets.laws_at_rest(), "the router is not quiescent")

    @property
    def counters(self) -> dict[str, int]:
        """All counters by name."""
        return {**self.requests.counters.as_dict(), COUNTER: self._unexpected.count, **self._self_check.counters}

    # ------------------------------------------------------------ events

    def _on_event(self, event: RouterEvent) -> None:
        match event:
            case Received(peer=peer, message=message):
                self._receive(peer, message)
            case Submitted(requests=requests):
                self._submit(requests)
            case ClientGone() | CancelRequested() | StopMatched():
                self._end_request(event)
            case TimerFired(key=key):
                self._on_timer(key)
            case PeerLost(peer=peer, reason=reason):
                self._nodes.lose(peer, reason)
            case NodesFound() | RegistryLost():
                self._nodes.follow(event)
            case DrainRequested() | DumpRequested() | CacheResetRequested():
                self._operate(event)
            case Started():
                self.node_table.expect_nodes(self._outbox.now)
                self._nodes.check_liveness()
            case Resumed(paused_s=paused_s):
                self._nodes.resumed(paused_s)
            case StopRequested():
                self._stop()
            case ClientsFinished():
                self._clients_gone = True
            case _:
                assert_never(event)

    def _operate(self, event: DrainRequested | DumpRequested | CacheResetRequested) -> None:
        match event:
            case DrainRequested(node_id=node_id, stay_down=stay_down):
                self._nodes.drain(node_id, stay_down=stay_down)
            case DumpRequested():
                self._nodes.dump(event)
            case CacheResetRequested(reset=reset):
                self._cache_resets.begin(reset)
            case _:
                assert_never(event)

    def _end_request(self, event: ClientGone | CancelRequested | StopMatched) -> None:
        match event:
            case ClientGone(request_id=request_id):
                self.requests.abort(request_id)
            case CancelRequested(request_id=request_id):
                self.requests.cancel(request_id)
            case StopMatched(request_id=request_id):
                self.requests.stop_matched(request_id)
            case _:
                assert_never(event)

    def _receive(self, peer: PeerId, message: Message) -> None:
        self._nodes.record_message(peer)
        may_send = isinstance(message, Register | Heartbeat) or self.node_table.get(peer) is not None
        if may_send and isinstance(message, RouterMessage):
            self._on_message(peer, message)
        else:
            self._unexpected.take(peer, message)

    def _on_message(self, peer: PeerId, message: RouterMessage) -> None:
        match message:
            case TokensOut(outputs=outputs):
                for output in outputs:
                    self.requests.take_output(peer, output)
            case PromptLogprobsOut():
                self.requests.take_prompt_logprobs(peer, message)
            case Heartbeat() | Register() | PrefixCacheChanged() | Leaving() | Drained():
                self._nodes.take(peer, message)
            case Dumped(dump_id=dump_id, process=process, path=path, error=error):
                self._outbox.do(DumpReported(dump_id, process, path, error))
            case PrefixCacheReset():
                self._cache_resets.take(peer, message)
            case RequestFailed():
                self.requests.take_failure(peer, message)
            case AttemptsHeld(attempts=attempts):
                self.requests.take_held(peer, attempts)
            case DecodeNeeded():
                self.requests.take_decode_needed(peer, message)
            case RequestPreempted():
                self.requests.take_preempted(peer, message)
            case RequestTimeline():
                self.requests.take_timeline(message)
            case _:
                assert_never(message)

    def _on_timer(self, key: Hashable) -> None:
        if isinstance(key, RequestTimer):
            self.requests.take_timer(key)
        elif key == LIVENESS:
            self._nodes.check_liveness()
            self._cache_resets.beat()
            self._self_check.beat(None if self.requests else self.requests.counters.submitted)
        elif key == DRAIN:
            self._stop_now()
        elif key == LAST_CLIENTS:
            self._clients_gone = self._clients_gone or self._awaits_last_clients
        else:
            raise LocalProtocolError(f"the router has no timer {key!r}")

    def _submit(self, requests: tuple[NewRequest, ...]) -> None:
        if self._clients_gone:
            self.requests.refuse(requests, NoNodeError("the router is stopping"))
        else:
            self.requests.submit(requests)

    def _stop(self) -> None:
        if self._stopping:
            self._stop_now()
            return
        self._stopping = True
        self._outbox.do(FinishClients(), SetTimer(DRAIN, self._outbox.now + self._drain_timeout_s))

    def _stop_now(self) -> None:
        self._clients_gone = True
        self.requests.fail_all(NoNodeError("the router is stopping"))

    def _end_if_done(self) -> None:
        """Exit when there is no request, and let clients that still write one or read an answer do so before."""
        if self.requests:
            self._awaits_last_clients = False
        elif self._clients_gone:
            self._outbox.do(Exit("stopped"))
        elif not self._awaits_last_clients:
            self._awaits_last_clients = True
            self._outbox.do(SetTimer(LAST_CLIENTS, self._outbox.now + LAST_CLIENTS_S))
