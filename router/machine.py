"""The router's machine: who is there, and what becomes of every request."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvrelay.errors import LocalProtocolError, NoNodeError
from kvrelay.machine.contract import (
    CoreAction,
    Disconnect,
    Exit,
    Log,
    PeerLost,
    Received,
    Send,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
)
from kvrelay.machine.outbox import RoleOutbox
from kvrelay.machine.unexpected import COUNTER, UnexpectedMessages
from kvrelay.protocol.ids import PeerId, peer_id
from kvrelay.protocol.messages.base import Heartbeat, Load, Message
from kvrelay.protocol.messages.node_to_router import (
    DecodeNeeded,
    Drained,
    Leaving,
    Register,
    RequestFailed,
    RequestPreempted,
    RequestTimeline,
    TokensOut,
)
from kvrelay.protocol.messages.router_to_node import Drain, RegisterAgain, Registered, RegistrationRefused
from router.events import (
    ClientGone,
    Deliver,
    DrainRequested,
    NewRequest,
    NodesFound,
    RegistryLost,
    StopMatched,
    Submitted,
)
from router.followed import FollowedNodes
from router.limits import Limits
from router.node_table import NodeTable
from router.placement import Placement
from router.policies import POLICIES
from router.requests import Requests, RequestTimer

_LIVENESS = "liveness"
_DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """All the machine must know. ``model`` is the name nodes must serve.

    Epochs begin after ``first_epoch``, so that those of several routers differ: clients may give equal request ids to
    two of them. ``local_prefill_tokens``: see ``Placement``.
    """

    model: str
    incarnation: str
    first_epoch: int = 0
    prefill_routing: str = "least_loaded"
    decode_routing: str = "least_loaded"
    local_prefill_tokens: int | None = None
    heartbeat_s: float = 1.0
    peer_timeout_s: float = 5.0
    drain_timeout_s: float = 30.0
    limits: Limits = field(default_factory=Limits)


class RouterMachine:
    """Events in, actions out: nodes' messages, clients' requests and departures, timers.

    Every admitted request gets exactly one terminal delivery. At rest nothing is left of any: ``assert_quiescent``.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._outbox: RoleOutbox[Deliver] = RoleOutbox()
        self._unexpected = UnexpectedMessages(self._outbox)
        self._stopping = False
        self._liveness_due_s = math.inf
        self._may_have_lost_us: set[PeerId] = set()
        decode_alone = settings.local_prefill_tokens is not None
        self.node_table = NodeTable(settings.model, settings.peer_timeout_s, decode_alone=decode_alone)
        prefill_routing, decode_routing = POLICIES[settings.prefill_routing](), POLICIES[settings.decode_routing]()
        self.requests = Requests(
            settings.limits,
            self.node_table,
            Placement(self.node_table, prefill_routing, decode_routing, settings.local_prefill_tokens),
            self._outbox.do,
            settings.first_epoch,
        )
        self.followed = FollowedNodes(settings.model, self._outbox.do)

    def handle(self, event: object, now: float) -> list[CoreAction | Deliver]:
        """Take ``event`` at time ``now`` (seconds); return what must be done, in order."""
        self._outbox.now = self.requests.now = now
        self._take(event)
        if self._stopping and not self.requests:
            self._outbox.do(Exit("stopped"))
        return self._outbox.take()

    def unready_reason(self) -> str | None:
        """Return why a request that came now would be refused, or None."""
        return "the router is stopping" if self._stopping else self.node_table.unready_reason()

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError if anything is left of any request."""
        self.requests.assert_quiescent()

    @property
    def counters(self) -> dict[str, int]:
        """What this router has done so far, by name."""
        return {**self.requests.counters.as_dict(), COUNTER: self._unexpected.count}

    # ------------------------------------------------------------ events

    def _take(self, event: object) -> None:
        match event:
            case Received(peer=peer, message=message):
                self._receive(peer, message)
            case Submitted(requests=requests):
                self._submit(requests)
            case ClientGone(request_id=request_id):
                self.requests.abort(request_id)
            case StopMatched(request_id=request_id):
                self.requests.stop_matched(request_id)
            case TimerFired(key=RequestTimer() as timer):
                self.requests.take_timer(timer)
            case PeerLost(peer=peer, reason=reason):
                self._lose(peer, reason)
            case NodesFound() | RegistryLost():
                self._follow(event)
            case DrainRequested(node_id=node_id):
                self._drain(node_id)
            case Started() | TimerFired(key="liveness"):
                self._check_liveness()
            case StopRequested():
                self._stop()
            case TimerFired(key="drain"):
                self.requests.fail_all(NoNodeError("the router is stopping"))
            case _:
                raise LocalProtocolError(f"the router has no use for {event!r}")

    def _submit(self, requests: tuple[NewRequest, ...]) -> None:
        if self._stopping:
            self.requests.refuse(requests, NoNodeError("the router is stopping"))
        else:
            self.requests.submit(requests)

    def _receive(self, peer: PeerId, message: Message) -> None:
        self.node_table.heard(peer, self._outbox.now)
        match message:
            case Register():
                self._register(peer, message)
            case Heartbeat(load=load):
                self._heartbeat(peer, load)
            case TokensOut(outputs=outputs):
                for output in outputs:
                    self.requests.take_output(peer, output)
            case RequestFailed():
                self.requests.take_failure(peer, message)
            case DecodeNeeded():
                self.requests.take_decode_needed(peer, message)
            case RequestPreempted():
                self.requests.take_preempted(peer, message)
            case RequestTimeline():
                self.requests.counters.kv_bytes_moved += self.requests.timelines.merge(message)
            case Leaving():
                self._leave(peer)
            case Drained():
                self._lose(peer, "drained")
            case _:
                self._unexpected.take(peer, message)

    # ------------------------------------------------------------ nodes come and go

    def _follow(self, event: NodesFound | RegistryLost) -> None:
        """Be connected with the nodes in the registry; without it, with those that are known."""
        if isinstance(event, RegistryLost):
            self.followed.problem = event.reason
            return
        self.followed.problem = None
        for peer in self.followed.take(event.entries, registered=lambda peer: self.node_table.get(peer) is not None):
            self._lose(peer, "restarted")
        for node in self.node_table:
            node.leaving |= self.followed.is_draining(node.peer)

    def _register(self, peer: PeerId, message: Register) -> None:
        if peer in self.followed and peer != peer_id(message.node_id, message.incarnation):
            self._lose(peer, f"{message.node_id}#{message.incarnation} is at its address")
            return
        reason = self.node_table.mismatch(peer, message)
        if reason is not None:
            self._refuse(peer, reason)
            return
        rival = self.node_table.rival(message)
        if rival is None:
            self._join(peer, message)
        elif rival.registration.address == message.address:
            # Two processes cannot listen at one address: the earlier one has ended.
            self._lose(rival.peer, "restarted")
            self._join(peer, message)
        else:
            self.node_table.contest(rival, peer, message)

    def _join(self, peer: PeerId, message: Register) -> None:
        known = self.node_table.get(peer)
        if known is not None and known.registration.session != message.session:
            if peer in self._may_have_lost_us:
                self._may_have_lost_us.discard(peer)
                self.requests.node_forgot(known)
            else:
                self.requests.node_lost(known, "it had taken this router for lost")
        self.node_table.add(peer, message, self._outbox.now)
        self._outbox.do(Send(peer, Registered(router_incarnation=self._settings.incarnation)))
        if known is None:
            self._log("info", "node registered", node=peer, role=message.role, address=message.address)
            self.requests.node_joined()

    def _refuse(self, peer: PeerId, reason: str) -> None:
        self.requests.counters.registrations_refused += 1
        self._log("error", "registration refused", peer=peer, reason=reason)
        self._outbox.do(Send(peer, RegistrationRefused(reason=reason)))

    def _heartbeat(self, peer: PeerId, load: Load | None) -> None:
        node = self.node_table.get(peer)
        if node is None:
            self._outbox.do(Send(peer, RegisterAgain()))
            return
        if load is not None:
            node.take_load(load)
        node.num_heartbeats += 1
        self.requests.move_preempted()
        self._refuse_rival_of(peer)

    def _leave(self, peer: PeerId) -> None:
        node = self.node_table.get(peer)
        if node is not None:
            node.leaving = True

    def _refuse_rival_of(self, peer: PeerId) -> None:
        """The holder of a name is alive, so whoever else came with that name cannot have it."""
        waiting = self.node_table.settle(peer)
        if waiting is not None:
            other, message = waiting
            self._refuse(other, f"another live node is called {message.node_id}")

    def _lose(self, peer: PeerId, reason: str) -> None:
        self.followed.forget(peer)
        node = self.node_table.remove(peer, self._outbox.now)
        if node is None:
            return
        self._log("info" if reason == "drained" else "warning", "node gone", node=peer, reason=reason)
        self.requests.counters.nodes_lost += reason != "drained"
        self._outbox.do(Disconnect(peer))
        self.requests.node_lost(node, reason)
        waiting = self.node_table.settle(peer)
        if waiting is not None:
            self._register(*waiting)

    def _check_liveness(self) -> None:
        """Lose the nodes that are silent, unless it was this process that did not listen.

        After a pause timers fire before sockets are read, so what nodes said meanwhile is heard first.
        """
        late_s = self._outbox.now - self._liveness_due_s
        if late_s > self._settings.peer_timeout_s / 2:
            self._log("warning", "the router was held up and judges no node until its next heartbeat", late_s=late_s)
            # Each may say so once for each time: a node that stalls itself, or cannot hear us, costs attempts as ever.
            self._may_have_lost_us = {node.peer for node in self.node_table}
        else:
            for peer in self.node_table.silent(self._outbox.now):
                self._lose(peer, f"not heard for {self._settings.peer_timeout_s:g} s")
        self.followed.beat()
        self._liveness_due_s = self._outbox.now + self._settings.heartbeat_s
        self._outbox.do(SetTimer(_LIVENESS, self._liveness_due_s))

    def _drain(self, node_id: str) -> None:
        node = self.node_table.named(node_id)
        if node is not None and not node.leaving:
            node.leaving = True
            self._outbox.do(Send(node.peer, Drain()))

    # ------------------------------------------------------------ stopping

    def _stop(self) -> None:
        if self._stopping:
            self.requests.fail_all(NoNodeError("the router is stopping"))
            return
        self._stopping = True
        self._outbox.do(SetTimer(_DRAIN, self._outbox.now + self._settings.drain_timeout_s))

    def _log(self, level: str, event: str, **fields: object) -> None:
        self._outbox.do(Log(level, event, fields))
