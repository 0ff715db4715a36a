from __future__ import annotations

from typing import Any

import msgspec
import pytest
from driver import Driver, new_request, peer
from fake_nodes import GEOMETRY, register

from kvrelay.machine.contract import Log, PeerLost, Received
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, Load
from kvrelay.protocol.messages.router_to_node import Drain, Prefill, RegisterAgain, Registered, RegistrationRefused
from router.node_table import Node
from router.policies import LeastLoaded, RoundRobin


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


# ---------------------------------------------------------------- policies


def by_id(pending: dict[str, int]) -> dict[RequestId, int]:
    return {RequestId(name): num_tokens for name, num_tokens in pending.items()}


def node(node_id: str, *, pending: dict[str, int] | None = None, max_num_seqs: int = 8, **load: Any) -> Node:
    found = Node(
        PeerId(peer(node_id)), register(node_id, "decode", max_num_seqs=max_num_seqs), pending=by_id(pending or {})
    )
    found.take_load(Load(**load))
    return found


def test_least_loaded_counts_prompts_to_compute_and_requests() -> None:
    idle, long_prompt, many = node("a"), node("b", pending={"r": 900}), node("c", pending=dict.fromkeys("rst", 0))
    assert LeastLoaded().choose([many, long_prompt, idle], []) is idle
    assert LeastLoaded().choose([long_prompt, many], []) is many


def test_least_loaded_heeds_what_heartbeats_tell_of_others_requests() -> None:
    assert LeastLoaded().choose([busy := node("a", num_running=4), idle := node("b")], []) is idle
    assert busy.num_requests == 4


def test_a_heartbeat_from_before_the_end_of_a_request_does_not_count_it() -> None:
    served = node("a", pending={"mine": 0, "yours": 0}, num_running=3)
    del served.pending[RequestId("mine")]
    assert served.num_requests == 2


def test_least_loaded_gives_larger_nodes_more() -> None:
    small, large = node("a", pending={"r": 0}, max_num_seqs=2), node("b", pending={"r": 0, "s": 0}, max_num_seqs=16)
    assert LeastLoaded().choose([small, large], []) is large


def test_least_loaded_takes_turns_between_equals() -> None:
    policy, nodes = LeastLoaded(), [node("a"), node("b"), node("c")]
    assert [policy.choose(nodes, []).node_id for _ in range(4)] == ["a", "b", "c", "a"]


def shortest_first(node_id: str, pending: dict[str, int] | None = None, role: str = "prefill", **load: Any) -> Node:
    registration = register(node_id, role, prefill_order="shortest_first")
    found = Node(PeerId(peer(node_id)), registration, pending=by_id(pending or {}))
    found.take_load(Load(**load))
    return found


def test_where_the_shortest_prompt_goes_first_only_prompts_that_are_no_longer_are_before_it() -> None:
    found = shortest_first("a", {"short": 100, "equal": 500, "long": 9000})
    assert [found.tokens_before(length) for length in (50, 100, 500, 9000)] == [0, 100, 600, 9600]
    assert Node(found.peer, register("a", "prefill"), pending=found.pending).tokens_before(50) == 9600


def test_what_others_queued_there_counts_by_the_lengths_that_the_heartbeat_tells() -> None:
    found = shortest_first("a", {"mine": 400}, queued_tokens=2400, prompt_tokens=[300, 100, 0, 2000, 0])
    assert found.tokens_before(100) == 2000 * 300 // 2400
    assert found.tokens_before(5000) == 2400
    assert shortest_first("a", queued_tokens=50).tokens_before(1) == 50  # nothing is known of lengths


def test_a_prompt_goes_where_it_waits_least_and_makes_others_wait_least() -> None:
    long, short = shortest_first("a", {"r": 9000}), shortest_first("b", {"r": 300})
    assert LeastLoaded().choose([long, short], [0] * 1000) is short  # it waits for 300 there; delays the other by 1,000
    many = shortest_first("a", dict.fromkeys("rstuvw", 2000))
    assert LeastLoaded().choose([many, short], [0] * 400) is short
    in_order = Node(PeerId("x"), register("x", "prefill"), pending={RequestId("r"): 9000})
    assert in_order.added_wait(100) == 9000
    assert long.added_wait(100) == 100
    assert LeastLoaded().choose([in_order, long], [0] * 100) is long


def test_a_decode_node_is_chosen_by_all_the_prompt_tokens_it_must_compute() -> None:
    busy = shortest_first("d0", {"r": 9000, "s": 0}, role="decode")
    less = shortest_first("d1", {"r": 300, "s": 0}, role="decode")
    assert LeastLoaded().choose([busy, less], [0] * 10) is less


def test_round_robin_goes_round_by_name_whoever_comes_and_goes() -> None:
    policy, (a, b, c) = RoundRobin(), (node("a"), node("b"), node("c"))
    assert [policy.choose([c, a, b], []).node_id for _ in range(4)] == ["a", "b", "c", "a"]
    assert policy.choose([a, c], []).node_id == "c"


def test_policies_are_picked_for_prefill_and_decode_apart() -> None:
    driver = Driver("p0 p1 d0 d1", policy="round_robin")
    pairs = []
    for i in range(3):
        driver.submit(new_request(f"r{i}"))
        entry, decode, _ = driver.dispatched()
        pairs.append((entry, decode))
    assert pairs == [(peer("p0"), peer("d0")), (peer("p1"), peer("d1")), (peer("p0"), peer("d0"))]
