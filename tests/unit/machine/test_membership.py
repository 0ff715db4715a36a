"""How a node stands with the one router of a static cluster, or with as many as a registry brings."""

from __future__ import annotations

from typing import Any

import pytest
from support.machines import node_config, registration

from kvrelay.config.cluster_config import RegistryConfig, Role
from kvrelay.machine.contract import Announce, CoreAction, Exit, Ready, Send
from kvrelay.machine.membership import DRAINING, READY, REFUSED, Membership, RegistrationMessage
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import ROUTER, PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, Load, Message
from kvrelay.protocol.messages.node_to_router import Drained, Leaving, Register
from kvrelay.protocol.messages.router_to_node import Abort, Drain, RegisterAgain, Registered, RegistrationRefused

A, B = "router#a", "router#b"
BEAT = Heartbeat(load=Load(num_waiting=3))


def registry(kind: str) -> RegistryConfig:
    return RegistryConfig.model_validate({"kind": kind, "url": None if kind == "static" else "redis://localhost"})


class Driver:
    """A node's membership; each call returns the actions that it led to."""

    def __init__(self, kind: str) -> None:
        node = node_config(Role.DECODE).model_copy(update={"registry": registry(kind)})
        self.outbox = Outbox()
        self.membership = Membership(registration(node), node, self.outbox)
        self.is_authorized, self.lost = self.membership.is_authorized, self.membership.lost

    def join(self) -> list[CoreAction]:
        self.membership.join()
        return self.outbox.take()

    def beat(self, load: Load) -> list[CoreAction]:
        self.membership.beat(load)
        return self.outbox.take()

    def leave(self) -> list[CoreAction]:
        self.membership.leave()
        return self.outbox.take()

    def drained(self) -> list[CoreAction]:
        self.membership.drained()
        return self.outbox.take()

    def record_message(self, peer: PeerId, now: float) -> None:
        self.outbox.now = now
        self.membership.record_message(peer)

    def silent(self, now: float) -> list[PeerId]:
        self.outbox.now = now
        return self.membership.silent()

    def receive(
        self, peer: PeerId, message: RegistrationMessage | Registered, now: float
    ) -> tuple[list[CoreAction], bool]:
        """Return, beside the actions, whether the router has changed."""
        self.outbox.now = now
        changed = False
        if isinstance(message, Registered):
            changed = self.membership.registered(peer, message.router_incarnation)
        else:
            self.membership.receive(peer, message)
        return self.outbox.take(), changed


def membership_of(kind: str) -> Driver:
    return Driver(kind)


def sent(actions: list[Any], to: PeerId) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Send) and action.peer == to]


def registered(membership: Driver, *routers: PeerId, now: float = 0.0) -> None:
    """Let ``routers`` find the node."""
    membership.join()
    for router in routers:
        actions, _ = membership.receive(router, Heartbeat(), now)
        assert [type(message) for message in sent(actions, router)] == [Register]
        membership.receive(router, Registered(router_incarnation=router[-1]), now)


# ---------------------------------------------------------------- one router


def test_a_node_asks_to_be_registered_until_it_is() -> None:
    membership = membership_of("static")
    [register] = sent(membership.join(), ROUTER)
    assert isinstance(register, Register)
    assert sent(membership.beat(Load()), ROUTER) == [register]
    actions, changed = membership.receive(ROUTER, Registered(router_incarnation="a"), 0.0)
    assert not sent(actions, ROUTER)
    assert not changed
    assert sent(membership.beat(Load(num_waiting=3)), ROUTER) == [BEAT]


def test_a_router_that_forgot_us_is_told_again_but_is_the_same() -> None:
    membership = membership_of("static")
    [register] = sent(membership.join(), ROUTER)
    membership.receive(ROUTER, Registered(router_incarnation="a"), 0.0)
    actions, changed = membership.receive(ROUTER, RegisterAgain(), 0.0)
    assert sent(actions, ROUTER) == [register]
    assert not changed
    assert sent(membership.beat(Load()), ROUTER) == [register]
    assert membership.receive(ROUTER, Registered(router_incarnation="a"), 0.0)[1] is False


def test_another_router_means_that_nobody_waits_for_what_we_hold() -> None:
    membership = membership_of("static")
    membership.receive(ROUTER, Registered(router_incarnation="a"), 0.0)
    membership.receive(ROUTER, RegisterAgain(), 0.0)
    assert membership.receive(ROUTER, Registered(router_incarnation="b"), 0.0)[1] is True
    assert membership.receive(ROUTER, Registered(router_incarnation="b"), 0.0)[1] is False


def test_the_one_router_is_never_given_up_for_its_silence() -> None:
    membership = membership_of("static")
    membership.receive(ROUTER, Registered(router_incarnation="a"), 0.0)
    assert membership.silent(1e6) == []


def test_nobody_else_is_the_one_router() -> None:
    membership = membership_of("static")
    assert membership.is_authorized(ROUTER, Drain())
    for stranger in (A, "d0#1", "messager"):
        assert not membership.is_authorized(PeerId(stranger), Drain())
        assert membership.receive(PeerId(stranger), Heartbeat(), 0.0) == ([], False)


# ---------------------------------------------------------------- several routers


def test_a_node_announces_itself_and_answers_each_router_that_finds_it() -> None:
    membership = membership_of("redis")
    assert membership.receive(PeerId(A), Heartbeat(), 0.0) == ([], False), "it cannot serve yet"
    assert membership.join() == [Ready(), Announce(READY)]
    registered(membership, PeerId(A), PeerId(B))
    assert membership.receive(PeerId(A), Heartbeat(), 0.0) == ([], False), "it is known there"
    actions = membership.beat(Load(num_waiting=3))
    assert (sent(actions, PeerId(A)), sent(actions, PeerId(B))) == ([BEAT], [BEAT])


def test_heartbeats_of_prefill_nodes_are_not_those_of_routers() -> None:
    membership = membership_of("redis")
    membership.join()
    assert membership.receive(PeerId("p0#1"), Heartbeat(), 0.0) == ([], False)


def test_only_a_silent_router_is_gone() -> None:
    membership = membership_of("redis")
    registered(membership, PeerId(A), PeerId(B))
    membership.record_message(PeerId(B), 4.0)
    assert membership.silent(5.0) == [A]
    membership.lost(PeerId(A))
    actions = membership.beat(Load(num_waiting=3))
    assert (sent(actions, PeerId(A)), sent(actions, PeerId(B))) == ([], [BEAT])


def test_a_router_that_was_given_up_and_comes_back_learns_that_all_it_had_here_is_dropped() -> None:
    membership = membership_of("redis")
    registered(membership, PeerId(A))
    membership.lost(PeerId(A))
    [register] = sent(membership.receive(PeerId(A), Heartbeat(), 9.0)[0], PeerId(A))
    assert isinstance(register, Register)
    assert register.session == 1


def test_a_router_that_gave_us_up_first_learns_of_no_new_session() -> None:
    membership = membership_of("redis")
    registered(membership, PeerId(A))
    [register] = sent(membership.receive(PeerId(A), RegisterAgain(), 0.0)[0], PeerId(A))
    assert isinstance(register, Register)
    assert register.session == 0
    assert membership.beat(Load()) == []


def test_a_router_that_is_not_known_is_obeyed_in_nothing_but_registering() -> None:
    membership = membership_of("redis")
    registered(membership, PeerId(A))
    abort = Abort(request_id=RequestId("r"), epoch=1)
    assert membership.is_authorized(PeerId(A), abort)
    assert not membership.is_authorized(PeerId(B), abort)
    assert membership.is_authorized(PeerId(B), RegisterAgain())
    assert not membership.is_authorized(PeerId("x#1"), RegisterAgain())
    assert not membership.is_authorized(PeerId("x#1"), abort)


@pytest.mark.parametrize(("kind", "router"), [("static", ROUTER), ("redis", PeerId(A))])
def test_a_leaving_node_says_so_to_a_router_that_registers_it_again(kind: str, router: PeerId) -> None:
    membership = membership_of(kind)
    membership.join()
    membership.receive(router, Registered(router_incarnation="a"), 0.0)
    membership.leave()
    membership.receive(router, RegisterAgain(), 0.0)
    actions, _ = membership.receive(router, Registered(router_incarnation="a"), 0.0)
    assert sent(actions, router) == [Leaving()]


def test_a_leaving_node_tells_all_routers_those_to_come_too() -> None:
    membership = membership_of("redis")
    registered(membership, PeerId(A))
    actions = membership.leave()
    assert actions[0] == Announce(DRAINING)
    assert sent(actions, PeerId(A)) == [Leaving()]
    actions, _ = membership.receive(PeerId(B), Registered(router_incarnation="b"), 0.0)
    assert sent(actions, PeerId(B)) == [Leaving()]
    actions = membership.drained()
    assert (sent(actions, PeerId(A)), sent(actions, PeerId(B))) == ([Drained()], [Drained()])


# ---------------------------------------------------------------- either


@pytest.mark.parametrize(("kind", "router"), [("static", ROUTER), ("redis", A)])
def test_a_refused_node_exits_with_the_reason(kind: str, router: PeerId) -> None:
    refusal = RegistrationRefused(reason="block_size: 16 != 32")
    actions, _ = membership_of(kind).receive(router, refusal, 0.0)
    assert actions[-1] == Exit(REFUSED)
    assert "block_size" in str(actions[0])
