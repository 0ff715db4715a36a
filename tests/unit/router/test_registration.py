from __future__ import annotations

from typing import Any

import msgspec
import pytest
from driver import Driver, peer
from fake_nodes import GEOMETRY, register

from kvrelay.machine.contract import Log, PeerLost, Received
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Heartbeat, Load
from kvrelay.protocol.messages.router_to_node import Drain, Prefill, RegisterAgain, Registered, RegistrationRefused


def names(driver: Driver) -> list[str]:
    return [node.peer for node in driver.machine.node_table]


def test_node_is_told_that_it_is_registered() -> None:
    driver = Driver("p0")
    assert driver.take_sent(Registered) == [(peer("p0"), Registered(router_incarnation="r1"))]
    driver.join("p0")
    assert len(driver.take_sent(Registered)) == 1
    assert names(driver) == [peer("p0")]


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


def test_restarted_node_at_the_same_address_replaces_its_earlier_self_at_once() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.take_sent(Prefill)
    driver.join("p0", "b")
    assert names(driver) == [peer("d0"), peer("p0", "b")]
    ((to, again),) = driver.take_sent(Prefill)
    assert (to, again.request.epoch) == (peer("p0", "b"), 2)


def test_name_taken_by_a_live_node_elsewhere_is_refused_once_that_shows_life() -> None:
    driver = Driver("p0")
    driver.take_sent(Registered)
    driver.join("p0", "b", address="tcp://elsewhere:1")
    assert driver.take_sent(Registered) == []
    assert driver.take_sent(RegistrationRefused) == []
    driver.receive(peer("p0"), Heartbeat())
    ((to, refusal),) = driver.take_sent(RegistrationRefused)
    assert (to, refusal.reason) == (peer("p0", "b"), "another live node is called p0")
    assert names(driver) == [peer("p0")]


def test_node_restarted_at_a_new_address_gets_its_name_when_its_earlier_self_is_lost() -> None:
    driver = Driver("p0")
    driver.join("p0", "b", address="tcp://elsewhere:1")
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    assert names(driver) == [peer("p0", "b")]
