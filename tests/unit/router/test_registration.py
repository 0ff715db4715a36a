from __future__ import annotations

from typing import Any

import msgspec
import pytest
from driver import Driver, peer
from fake_nodes import GEOMETRY, register
from support.messages import EXAMPLES

from kvrelay.machine.contract import Log, PeerLost, Received, Resumed, TimerFired
from kvrelay.protocol.ids import NodeId, PeerId
from kvrelay.protocol.messages.base import Heartbeat, Load, Message
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.messages.router_to_node import (
    Drain,
    Prefill,
    PrefillNodes,
    RegisterAgain,
    Registered,
    RegistrationRefused,
)
from router.expected_nodes import ExpectedNode
from router.node_table import MAX_RIVALS
from router.nodes import LIVENESS

PEER_TIMEOUT_S = 5.0
"""RouterSettings' default."""


def names(driver: Driver) -> list[str]:
    return [node.peer for node in driver.machine.node_table]


def test_node_is_told_that_it_is_registered() -> None:
    driver = Driver("p0")
    assert driver.take_sent(Registered) == [(peer("p0"), Registered(router_incarnation="r1", wants_attempts=True))]
    driver.join("p0")
    assert len(driver.take_sent(Registered)) == 1
    assert names(driver) == [peer("p0")]


@pytest.mark.fault("F27")
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "other"}, "'other', the cluster serves 'demo'"),
        ({"geometry": msgspec.structs.replace(GEOMETRY, block_size=32)}, "block_size: 16 != 32"),
        ({"geometry": msgspec.structs.replace(GEOMETRY, dtype="float16")}, "dtype: 'float32' != 'float16'"),
        ({"geometry": msgspec.structs.replace(GEOMETRY, protocol_version=99)}, "protocol version 99"),
    ],
)
def test_node_that_does_not_match_is_refused_with_the_difference(fields: dict[str, Any], said: str) -> None:
    driver = Driver("p0")
    driver.join("d0", **fields)
    ((to, refusal),) = driver.take_sent(RegistrationRefused)
    assert to == peer("d0")
    assert said in refusal.reason
    assert names(driver) == [peer("p0")]


def test_unknown_role_and_foreign_name_are_refused() -> None:
    driver = Driver()
    driver.receive(peer("x0"), register("x0", "observer"))
    driver.receive(peer("p1"), register("p0", "prefill"))
    assert [to for to, _ in driver.take_sent(RegistrationRefused)] == [peer("x0"), peer("p1")]
    assert names(driver) == []


def test_heartbeat_of_a_stranger_is_asked_to_register() -> None:
    driver = Driver()
    driver.receive(peer("p0"), Heartbeat())
    assert driver.take_sent(RegisterAgain) == [(peer("p0"), RegisterAgain())]


def test_message_no_router_takes_is_counted_and_logged_once() -> None:
    driver = Driver("p0")
    actions = [action for _ in range(3) for action in driver.do(Received(PeerId(peer("p0")), Drain()))]
    assert [(log.event, log.fields["peer"]) for log in actions if isinstance(log, Log)] == [
        ("unexpected message", peer("p0"))
    ]
    assert driver.machine.counters["unexpected_messages"] == 3
    assert names(driver) == [peer("p0")]


def test_silent_node_is_lost_and_one_that_speaks_is_not() -> None:
    driver = Driver("p0 d0")
    for _ in range(6):
        driver.wait(1.0)
        driver.receive(peer("d0"), Heartbeat(load=Load(num_running=1)))
    assert names(driver) == [peer("d0")]
    assert driver.machine.requests.counters.nodes_lost == 1


def test_restarted_node_at_the_same_address_replaces_its_earlier_self_when_that_cannot_be_reached() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.take_sent(Prefill)
    driver.join("p0", "b")
    assert driver.take_sent(Heartbeat) == [(peer("p0"), Heartbeat())]
    driver.do(PeerLost(PeerId(peer("p0")), "Host unreachable"))
    assert names(driver) == [peer("d0"), peer("p0", "b")]
    ((to, again),) = driver.take_sent(Prefill)
    assert (to, again.request.epoch) == (peer("p0", "b"), 2)


@pytest.mark.fault("F28")
def test_a_stranger_with_name_and_address_of_a_live_node_does_not_replace_it() -> None:
    """Before, one Register removed the node and failed its requests."""
    driver = Driver("p0 d0")
    driver.submit()
    driver.take_sent(Prefill)
    driver.join("p0", "b")
    driver.now += PEER_TIMEOUT_S / 2
    driver.receive(peer("p0"), Heartbeat())
    assert names(driver) == [peer("p0"), peer("d0")]
    assert driver.take_sent(Prefill) == []
    assert [to for to, _ in driver.take_sent(RegistrationRefused)] == [peer("p0", "b")]


def test_name_taken_by_a_live_node_elsewhere_is_refused_once_that_shows_life() -> None:
    driver = Driver("p0")
    driver.take_sent(Registered)
    driver.join("p0", "b", address="tcp://elsewhere:1")
    assert driver.take_sent(Registered) == []
    assert driver.take_sent(RegistrationRefused) == []
    driver.now += PEER_TIMEOUT_S / 2
    driver.join("p0", "b", address="tcp://elsewhere:1")  # as it does with each heartbeat: it waits since the first time
    driver.receive(peer("p0"), Heartbeat())
    ((to, refusal),) = driver.take_sent(RegistrationRefused)
    assert (to, refusal.reason) == (peer("p0", "b"), "another live node is called p0")
    assert names(driver) == [peer("p0")]


def test_old_heartbeats_of_a_node_that_was_killed_do_not_refuse_the_next_one() -> None:
    """A router that was stopped reads them after the new registration. What was refused was never started again."""
    driver = Driver("p0 d0")
    driver.now += 3.0
    driver.join("p0", "b")
    driver.receive(peer("p0"), Heartbeat())
    driver.now += 3.0
    driver.do(Resumed(3.0))
    driver.receive(peer("p0"), Heartbeat())
    assert driver.take_sent(RegistrationRefused) == []
    driver.now += PEER_TIMEOUT_S - 1.0
    driver.join("p0", "b")  # as it does with each heartbeat
    driver.now += 1.1
    driver.do(TimerFired(LIVENESS))
    assert peer("p0", "b") in names(driver)
    assert peer("p0") not in names(driver)


def test_node_restarted_at_a_new_address_gets_its_name_when_its_earlier_self_is_lost() -> None:
    driver = Driver("p0")
    driver.join("p0", "b", address="tcp://elsewhere:1")
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    assert names(driver) == [peer("p0", "b")]


@pytest.mark.parametrize("how", ["lost", "silent"])
def test_a_waiting_node_that_has_ended_since_does_not_get_the_name(how: str) -> None:
    """Prompts would have gone to it until it was missed."""
    driver = Driver("p0")
    driver.join("p0", "b")
    if how == "lost":
        driver.do(PeerLost(PeerId(peer("p0", "b")), "killed"))
    else:
        driver.now += PEER_TIMEOUT_S
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    assert names(driver) == []


def test_two_live_nodes_that_register_in_turn_for_one_name_are_both_refused() -> None:
    """Before, each began the wait of the other anew, and neither was refused."""
    driver = Driver("p0")
    driver.take_sent(Registered)
    for _ in range(6):
        for rival in ("b", "c"):
            driver.join("p0", rival)
            driver.now += PEER_TIMEOUT_S / 10
        driver.receive(peer("p0"), Heartbeat())
    refused = [to for to, _ in driver.take_sent(RegistrationRefused)]
    assert set(refused) == {peer("p0", "b"), peer("p0", "c")}
    assert names(driver) == [peer("p0")]


def test_the_wait_of_an_earlier_rival_proves_nothing_about_a_later_one() -> None:
    """The holder may have ended in between: the later one may be its restart."""
    driver = Driver("p0")
    driver.take_sent(Registered)
    driver.join("p0", "b")
    driver.now += PEER_TIMEOUT_S / 2
    driver.join("p0", "c")
    driver.receive(peer("p0"), Heartbeat())
    assert [to for to, _ in driver.take_sent(RegistrationRefused)] == [peer("p0", "b")]
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    assert names(driver) == [peer("p0", "c")]


def test_rivals_for_one_name_are_bounded_and_one_that_registers_again_keeps_its_place() -> None:
    driver = Driver("p0")
    for number in range(100):
        driver.join("p0", f"x{number}")
    driver.join("p0", "x1")
    driver.now += PEER_TIMEOUT_S / 2
    driver.receive(peer("p0"), Heartbeat())
    refused = [to for to, _ in driver.take_sent(RegistrationRefused)]
    assert len(refused) == MAX_RIVALS
    assert peer("p0", "x1") in refused


# ---------------------------------------------------------------- strangers

EXPECTED = {
    NodeId("p0"): ExpectedNode("prefill", register("p0", "prefill").address, {"block_size": 16, "num_layers": 2}),
    NodeId("d0"): ExpectedNode("decode", register("d0", "decode").address, {"block_size": 16, "num_layers": 2}),
}


@pytest.mark.parametrize(
    ("name", "role", "fields", "said"),
    [
        ("m0", "mixed", {}, "the router's config has no node m0"),
        ("d0", "mixed", {}, "d0 is a mixed node, in the router's config a decode node"),
        ("d0", "decode", {"address": "tcp://evil:1"}, "d0 listens at tcp://evil:1"),
        ("d0", "decode", {"geometry": msgspec.structs.replace(GEOMETRY, num_layers=7)}, "num_layers: 2 != 7"),
    ],
)
def test_a_node_that_the_config_does_not_have_is_refused_and_gets_no_prompt(
    name: str, role: str, fields: dict[str, Any], said: str
) -> None:
    """Before, a rogue mixed node got prompts, and the first to register fixed the geometry for all others."""
    driver = Driver(expected_nodes=EXPECTED)
    driver.receive(peer(name, "x"), register(name, role, "x", **fields))
    ((to, refusal),) = driver.take_sent(RegistrationRefused)
    assert to == peer(name, "x")
    assert said in refusal.reason
    driver.join("p0")
    driver.join("d0")
    assert names(driver) == [peer("p0"), peer("d0")]


@pytest.mark.parametrize("message", [message for message in EXAMPLES if not isinstance(message, Register | Heartbeat)])
def test_nothing_but_registration_is_taken_from_who_is_not_registered(message: Message) -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.sent.clear()
    driver.receive(peer("x"), message)
    assert driver.sent == []
    assert driver.machine.counters["unexpected_messages"] == 1
    assert driver.delivered == {}


def test_decode_nodes_are_told_of_every_prefill_node_that_comes_or_goes() -> None:
    driver = Driver()
    for name in ("p0", "d0", "p1"):
        driver.join(name)
    told = [(to, message.peers) for to, message in driver.take_sent(PrefillNodes)]
    assert told == [(peer("d0"), [peer("p0")]), (peer("d0"), [peer("p0"), peer("p1")])]
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    assert driver.take_sent(PrefillNodes) == [(peer("d0"), PrefillNodes(peers=[PeerId(peer("p1"))]))]
