"""Nodes that come and go through the registry, as the router's machine sees it."""

from __future__ import annotations

from typing import Any

import pytest
from driver import Driver, new_request, peer
from fake_nodes import register

from kvrelay.errors import RemoteProtocolError
from kvrelay.machine.contract import Connect, Disconnect, Log, PeerLost, Received
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.protocol.messages.node_to_router import Drained
from kvrelay.protocol.messages.router_to_node import Generate, Prefill, Registered, RegistrationRefused
from kvrelay.registry.node_entry import NodeEntry, pack_entry, present, unpack_entry
from router.events import NodesFound, RegistryLost


def entry(
    name: str, incarnation: str = "a", *, state: str = "ready", started_s: float = 1.0, **fields: Any
) -> NodeEntry:
    role = {"p": "prefill", "d": "decode", "m": "mixed"}[name[0]]
    return NodeEntry(registration=register(name, role, incarnation, **fields), state=state, started_s=started_s)


def find(driver: Driver, *entries: NodeEntry) -> list[Connect | Disconnect]:
    """Let the registry be read; return what became of connections."""
    actions = driver.do(NodesFound(entries))
    return [action for action in actions if isinstance(action, Connect | Disconnect)]


def connect(found: NodeEntry) -> Connect:
    return Connect(found.peer, found.address)


def names(driver: Driver) -> list[str]:
    return [node.peer for node in driver.machine.node_table]


# ---------------------------------------------------------------- coming


def test_a_node_in_the_registry_is_called_until_it_registers() -> None:
    driver = Driver()
    m0 = entry("m0")
    assert find(driver, m0) == [connect(m0)]
    assert driver.take_sent(Heartbeat) == [(peer("m0"), Heartbeat())]
    driver.wait(1.0)
    assert driver.take_sent(Heartbeat) == [(peer("m0"), Heartbeat())]
    assert find(driver, m0) == []
    assert names(driver) == []
    driver.join("m0")
    assert driver.take_sent(Registered)
    assert names(driver) == [peer("m0")]


def test_registered_nodes_keep_hearing_that_the_router_lives() -> None:
    driver = Driver()
    find(driver, entry("m0"))
    driver.join("m0")
    driver.take_sent(Heartbeat)
    driver.wait(1.0)
    assert driver.take_sent(Heartbeat) == [(peer("m0"), Heartbeat())]


def test_nodes_of_a_static_cluster_hear_no_heartbeats() -> None:
    driver = Driver("m0")
    driver.wait(1.0)
    assert driver.take_sent(Heartbeat) == []


def test_nodes_of_another_model_are_logged_once_and_not_remembered_when_they_have_left() -> None:
    """Each start of one was remembered for ever."""
    driver = Driver()
    logged = [
        sum(isinstance(action, Log) for action in driver.do(NodesFound((entry("m0", incarnation, model="other"),))))
        for incarnation in ("a", "a", "b", "b", "a")
    ]
    assert logged == [1, 0, 1, 0, 1]


def test_nodes_of_another_model_are_left_alone() -> None:
    driver = Driver()
    assert find(driver, entry("m0", model="other")) == []
    assert driver.take_sent(RegistrationRefused) == []


# ---------------------------------------------------------------- going


def test_an_entry_that_vanished_is_no_loss_while_the_node_speaks() -> None:
    driver = Driver()
    find(driver, entry("m0"))
    driver.join("m0")
    assert find(driver) == []
    assert names(driver) == [peer("m0")]
    driver.do(RegistryLost("gone"))
    assert names(driver) == [peer("m0")]
    assert driver.machine.followed.problem == "gone"
    find(driver)
    assert driver.machine.followed.problem is None


def test_a_silent_node_is_gone_and_called_again_only_while_its_entry_is_there() -> None:
    driver = Driver()
    m0 = entry("m0")
    find(driver, m0)
    driver.join("m0")
    driver.wait(6.0)
    assert names(driver) == []
    assert find(driver, m0) == [connect(m0)]
    assert find(driver) == [Disconnect(m0.peer)]
    driver.take_sent(Heartbeat)
    driver.wait(1.0)
    assert driver.take_sent(Heartbeat) == []


def lose_registry(driver: Driver) -> list[Connect | Disconnect]:
    """Let the registry become unreadable; return what became of connections."""
    actions = driver.do(RegistryLost("gone"))
    return [action for action in actions if isinstance(action, Connect | Disconnect)]


def test_a_node_lost_while_the_registry_is_lost_is_called_again_at_once() -> None:
    driver = Driver()
    m0 = entry("m0")
    find(driver, m0)
    driver.join("m0")
    assert lose_registry(driver) == []
    actions = driver.do(PeerLost(m0.peer, "its queue is full"))
    assert [a for a in actions if isinstance(a, Connect | Disconnect)] == [Disconnect(m0.peer), connect(m0)]
    assert names(driver) == []
    driver.join("m0")
    assert names(driver) == [m0.peer]


def test_a_node_lost_before_the_registry_was_found_lost_is_called_again_then() -> None:
    driver = Driver()
    m0 = entry("m0")
    find(driver, m0)
    driver.join("m0")
    driver.do(PeerLost(m0.peer, "its queue is full"))
    assert lose_registry(driver) == [connect(m0)]
    assert lose_registry(driver) == []


def test_a_node_restarted_while_the_registry_is_lost_is_called_by_its_new_name() -> None:
    driver = Driver()
    old, new = entry("m0"), entry("m0", "b")
    find(driver, old)
    driver.join("m0")
    lose_registry(driver)
    actions = driver.do(Received(old.peer, new.registration))
    assert [a for a in actions if isinstance(a, Connect | Disconnect)] == [Disconnect(old.peer), connect(new)]
    driver.join("m0", "b")
    assert names(driver) == [new.peer]


@pytest.mark.parametrize(
    "stranger", [entry("m1", "b"), entry("m0", "b", model="other"), entry("m0", "b", address="tcp://elsewhere:1")]
)
def test_a_stranger_at_the_address_of_a_lost_node_is_not_called(stranger: NodeEntry) -> None:
    driver = Driver()
    old = entry("m0")
    find(driver, old)
    lose_registry(driver)
    actions = driver.do(Received(old.peer, stranger.registration))
    assert [a for a in actions if isinstance(a, Connect | Disconnect)] == [Disconnect(old.peer)]
    assert names(driver) == []


def test_what_the_registry_says_counts_again_when_it_is_back() -> None:
    driver = Driver()
    m0 = entry("m0")
    find(driver, m0)
    lose_registry(driver)
    assert find(driver) == [Disconnect(m0.peer)]


def test_a_node_that_has_drained_is_gone() -> None:
    driver = Driver()
    find(driver, entry("m0"))
    driver.join("m0")
    driver.receive(peer("m0"), Drained())
    assert names(driver) == []
    assert find(driver) == []


def test_a_draining_node_gets_nothing_new() -> None:
    driver = Driver()
    find(driver, entry("m0"))
    driver.join("m0")
    find(driver, entry("m0", state="draining"))
    assert driver.machine.unready_reason() is not None


# ---------------------------------------------------------------- the same name, the same address


def test_a_restarted_node_replaces_its_earlier_self_while_that_is_still_in_the_registry() -> None:
    driver = Driver()
    old, new = entry("m0"), entry("m0", "b", started_s=2.0)
    find(driver, old)
    driver.join("m0")
    driver.submit()
    driver.take_sent(Generate)
    connections = find(driver, new, old)
    assert connections.index(Disconnect(old.peer)) < connections.index(connect(new))
    assert names(driver) == []
    driver.join("m0", "b")
    ((to, again),) = driver.take_sent(Generate)
    assert (to, again.request.epoch) == (new.peer, 2)
    assert find(driver, new, old) == []


def test_whoever_answers_at_an_address_in_anothers_place_is_not_taken_for_it() -> None:
    """m0 was started again, and the router's old connection reaches its successor before the registry tells of it."""
    driver = Driver()
    old, new = entry("m0"), entry("m0", "b", started_s=2.0)
    find(driver, old)
    driver.join("m0")
    driver.receive(old.peer, new.registration)
    assert driver.take_sent(RegistrationRefused) == []
    assert names(driver) == []
    assert find(driver, old, new) == [connect(new)]
    driver.join("m0", "b")
    assert names(driver) == [new.peer]


def test_two_live_nodes_of_one_name_are_one_too_many() -> None:
    driver = Driver()
    first, second = entry("m0"), entry("m0", "b", address="tcp://elsewhere:1", started_s=2.0)
    assert len(find(driver, first, second)) == 2
    driver.join("m0")
    driver.join("m0", "b", address="tcp://elsewhere:1")
    for _ in range(6):  # the heartbeats of half a peer_timeout_s
        driver.wait(0.5)
        driver.receive(first.peer, Heartbeat())
    ((to, _),) = driver.take_sent(RegistrationRefused)
    assert to == second.peer


def test_of_one_address_the_last_start_counts_whatever_the_order() -> None:
    old, new, other = entry("m0"), entry("m0", "b", started_s=2.0), entry("m1", address="tcp://x:1", started_s=3.0)
    assert present([other, new, old]) == present([old, other, new]) == [new, other]


# ---------------------------------------------------------------- sessions


@pytest.mark.parametrize("found", [True, False])
def test_requests_of_a_node_that_took_the_router_for_lost_are_given_to_others(found: bool) -> None:
    driver = Driver()
    if found:
        find(driver, entry("m0"), entry("m1"))
    driver.join("m0")
    driver.join("m1")
    driver.submit(new_request("r"))
    ((first, _),) = driver.take_sent(Generate)
    name = first.partition("#")[0]
    driver.join(name)  # said twice: nothing new
    assert driver.take_sent(Generate) == []
    driver.join(name, session=1)
    ((second, again),) = driver.take_sent(Generate)
    assert second != first
    assert again.request.epoch == 2
    driver.join(name, session=1)
    assert driver.take_sent(Generate) == []
    assert len(names(driver)) == 2


def test_a_node_that_cannot_be_reached_is_called_anew() -> None:
    driver = Driver()
    p0, d0 = entry("p0"), entry("d0")
    find(driver, p0, d0)
    driver.join("p0")
    driver.join("d0")
    driver.submit()
    driver.take_sent(Prefill)
    driver.do(PeerLost(p0.peer, "its queue is full"))
    assert find(driver, p0, d0) == [connect(p0)]
    driver.join("p0")
    assert len(driver.take_sent(Prefill)) == 1


def test_epochs_begin_where_the_router_was_told() -> None:
    driver = Driver("m0", first_epoch=7 << 24)
    driver.submit()
    ((_, generate),) = driver.take_sent(Generate)
    assert generate.request.epoch == (7 << 24) + 1


# ---------------------------------------------------------------- entries


def test_an_entry_goes_through_json() -> None:
    assert unpack_entry(pack_entry(entry("d0"))) == entry("d0")


@pytest.mark.parametrize("address", ["tcp://[::1]:8200", "tcp://[2001:db8::7]:65535", "tcp://[fe80::1%eth0]:1"])
def test_an_entry_may_have_an_ipv6_address(address: str) -> None:
    assert unpack_entry(pack_entry(entry("d0", address=address))).address == address


@pytest.mark.parametrize(
    "address",
    ["ipc:///x", "tcp://*:1", "tcp://h:0", "tcp://h:65536", "tcp://h", "tcp://h:1\n", "tcp://::1:8200", "tcp://[h]:1"],
)
def test_an_entry_with_an_address_nobody_could_connect_to_is_none(address: str) -> None:
    with pytest.raises(RemoteProtocolError, match="no address"):
        unpack_entry(pack_entry(entry("d0", address=address)))


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 10_000, b'{"state": 1}', b"x" * 100_000])
def test_noise_is_no_entry(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack_entry(data)
