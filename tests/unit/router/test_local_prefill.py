"""Decode nodes compute prompts themselves when prefill nodes are behind."""

from __future__ import annotations

from typing import Any

import pytest
from driver import Driver, new_request, peer
from pydantic import ValidationError

from kvrelay.config.cluster_config import ClusterConfig, RouterConfig
from kvrelay.machine.contract import PeerLost
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, Load, Message
from kvrelay.protocol.messages.node_to_router import Leaving, RequestPreempted
from kvrelay.protocol.messages.router_to_node import Abort, Generate, Prefill
from kvrelay.protocol.request import FinishReason
from router.events import ClientGone, NewRequest, StopMatched
from router.limits import Limits
from router.service import router_settings

PROMPT_LEN = 100
BLOCKS = 7 + 1
"""What a prompt needs: blocks of 16 tokens, and one to grow into."""


def lending(nodes: str, local_prefill_tokens: int | None = PROMPT_LEN, **options: Any) -> Driver:
    """Return a router whose decode nodes have said that they have room."""
    driver = Driver(nodes, local_prefill_tokens=local_prefill_tokens, **options)
    for name in nodes.split():
        if name.startswith("d"):
            room(driver, name)
    return driver


def room(driver: Driver, name: str, free: int = 1000, **load: Any) -> None:
    driver.receive(peer(name), Heartbeat(load=Load(free_blocks=free, **load)))


def prompt(request_id: str, num_tokens: int = PROMPT_LEN, max_tokens: int = 8) -> NewRequest:
    return new_request(request_id, prompt=list(range(num_tokens)), max_tokens=max_tokens)


def entries(driver: Driver, *requests: NewRequest) -> list[str]:
    """Submit one after the other; return the names of the nodes that compute the prompts."""
    names = []
    for request in requests:
        driver.submit(request)
        names.append(entry(driver))
    return names


def entry(driver: Driver) -> str:
    """Return the name of the node that the one request just dispatched went to, as the message for its role."""
    sent: list[tuple[str, Message]] = [*driver.take_sent(Prefill), *driver.take_sent(Generate)]
    ((to, message),) = sent
    assert isinstance(message, Prefill) is to.startswith("p")
    return to.partition("#")[0]


# ---------------------------------------------------------------- the rule


def test_it_computes_no_prompt_unless_told_to() -> None:
    driver = lending("p0 d0", None)
    assert entries(driver, *(prompt(f"r{i}") for i in range(6))) == ["p0"] * 6
    assert driver.machine.requests.counters.local_prefills == 0


def test_what_counts_is_how_far_prefill_nodes_are_behind() -> None:
    driver = lending("p0 d0", 2 * PROMPT_LEN)
    assert entries(driver, *(prompt(f"r{i}") for i in range(7))) == ["p0", "p0", "d0", "p0", "d0", "p0", "d0"]
    assert driver.machine.requests.counters.local_prefills == 3


@pytest.mark.parametrize(("tokens", "expected"), [(PROMPT_LEN, "d0"), (PROMPT_LEN + 1, "p0")])
def test_the_difference_must_reach_what_the_setting_says(tokens: int, expected: str) -> None:
    assert entries(lending("p0 d0", tokens), prompt("a"), prompt("b")) == ["p0", expected]


def test_a_short_prompt_stays_where_the_shortest_goes_first_whatever_is_behind_it() -> None:
    for order, expected in (("fifo", "d0"), ("shortest_first", "p0")):
        driver = Driver(local_prefill_tokens=PROMPT_LEN)
        driver.join("p0", prefill_order=order)
        driver.join("d0")
        room(driver, "d0")
        assert entries(driver, prompt("long", 4 * PROMPT_LEN), prompt("short")) == ["p0", expected]
        assert entries(driver, prompt("longer", 5 * PROMPT_LEN)) == ["d0"]


def test_a_prompt_that_is_computed_is_nobody_s_work_any_more() -> None:
    driver = lending("p0 d0")
    assert entries(driver, prompt("a"), prompt("b")) == ["p0", "d0"]
    driver.tokens("p0", 0, [1], request_id="a")
    assert entries(driver, prompt("c")) == ["p0"]
    driver.tokens("d0", 0, [1], epoch=2, request_id="b")
    assert entries(driver, prompt("d")) == ["d0"]


def test_all_prefill_nodes_must_be_behind() -> None:
    driver = lending("p0 p1 d0", policy="round_robin")
    assert entries(driver, prompt("a"), prompt("b")) == ["p0", "p1"]
    driver.tokens("p1", 0, [1], epoch=2, request_id="b")
    assert entries(driver, prompt("c"), prompt("d"), prompt("e")) == ["p0", "p1", "d0"]


def test_the_decode_node_with_least_to_compute_takes_it_and_of_equals_the_one_with_most_room() -> None:
    driver = lending("p0 d0 d1 d2", 0)
    room(driver, "d1", 1001)
    assert entries(driver, prompt("a", 10), prompt("b", 20), prompt("c", 30)) == ["d1", "d0", "d2"]
    entries(driver, prompt("on p", 30))
    assert entries(driver, prompt("d")) == ["d1"]


def test_a_mixed_node_that_is_chosen_keeps_the_request() -> None:
    driver = lending("m0 p0 d0", 0)
    driver.submit(prompt("a"), prompt("b"))
    assert sorted(to for to, _ in driver.take_sent(Generate)) == [peer("d0"), peer("m0")]


def test_one_token_may_come_from_a_decode_node_too() -> None:
    driver = lending("p0 d0")
    assert entries(driver, prompt("a"), prompt("b", max_tokens=1)) == ["p0", "d0"]
    driver.tokens("d0", 0, [5], epoch=2, request_id="b", finish=FinishReason.LENGTH)
    assert driver.output("b") == [5]


# ---------------------------------------------------------------- room


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ({"free": BLOCKS}, "d0"),
        ({"free": BLOCKS - 1}, "p0"),
        ({"free": 0, "evictable_blocks": BLOCKS}, "d0"),
        ({"free": BLOCKS + 3, "headroom_blocks": 3}, "d0"),
        ({"free": BLOCKS + 3, "headroom_blocks": 4}, "p0"),
        ({"num_running": 6, "num_receiving": 1}, "d0"),
        ({"num_running": 6, "num_receiving": 1, "num_waiting": 1}, "p0"),
    ],
)
def test_it_needs_blocks_that_nobody_else_will_want_and_a_slot(load: dict[str, Any], expected: str) -> None:
    driver = lending("p0 d0")
    room(driver, "d0", **load)
    assert entries(driver, prompt("a"), prompt("b")) == ["p0", expected]


def test_before_its_first_heartbeat_nothing_is_known_of_its_room() -> None:
    assert entries(Driver("p0 d0", local_prefill_tokens=0), prompt("a")) == ["p0"]


def test_a_prompt_that_waits_there_keeps_nobody_away_but_gets_its_blocks_first() -> None:
    driver = lending("p0 d0", 2 * PROMPT_LEN)
    assert entries(driver, prompt("a"), prompt("b"), prompt("c")) == ["p0", "p0", "d0"]
    for free, expected in ((2 * BLOCKS, "d0"), (2 * BLOCKS - 2, "p0")):
        room(driver, "d0", free, num_waiting=1, waiting_tokens=PROMPT_LEN)
        driver.submit(prompt("long", 3 * PROMPT_LEN, 2))
        driver.take_sent(Prefill)
        assert entries(driver, prompt("d")) == [expected]
        for request_id in ("long", "d"):
            driver.do(ClientGone(RequestId(request_id)))


def test_preempted_requests_that_wait_there_keep_it_away() -> None:
    driver = lending("p0 d0", 50)
    room(driver, "d0", num_waiting=1, waiting_tokens=10, num_preempted=1)
    assert entries(driver, prompt("a"), prompt("b")) == ["p0", "p0"]
    room(driver, "d0", num_waiting=1, waiting_tokens=10, num_preempted=0)
    assert entries(driver, prompt("c")) == ["d0"]


def test_the_same_room_is_not_given_away_twice() -> None:
    driver = lending("p0 d0", 0)
    room(driver, "d0", 2 * BLOCKS)
    assert entries(driver, prompt("a"), prompt("b"), prompt("c"), prompt("d")) == ["d0", "p0", "d0", "p0"]
    for index, request_id in ((0, "a"), (2, "c")):
        driver.tokens("d0", 0, [1], epoch=index + 1, request_id=request_id)
    assert entries(driver, prompt("e")) == ["p0"]
    room(driver, "d0", BLOCKS)
    assert entries(driver, prompt("f")) == ["d0"]


def test_the_same_slot_is_not_given_away_twice() -> None:
    driver = lending("p0 d0")
    room(driver, "d0", num_running=7)
    assert entries(driver, prompt("a"), prompt("b"), prompt("c"), prompt("d")) == ["p0", "d0", "p0", "p0"]


def test_room_given_to_a_moved_request_is_not_given_to_a_prompt() -> None:
    driver = lending("p0 d0 d1", 10 * PROMPT_LEN)
    driver.submit(prompt("a"))
    [(_, message)] = driver.take_sent(Prefill)
    assert message.decode_node is not None
    source, target = message.decode_node.peer, "d0" if message.decode_node.peer == peer("d1") else "d1"
    driver.tokens("p0", 0, [1], request_id="a")
    driver.tokens_from(source, 1, [2], request_id="a")
    room(driver, source.partition("#")[0], 0)
    room(driver, target, BLOCKS + 4)
    driver.receive(source, RequestPreempted(request_id=RequestId("a"), epoch=1, num_blocks=5))
    assert [to for to, _ in driver.take_sent(Generate)] == [peer(target)]
    driver.submit(prompt("long", 10 * PROMPT_LEN))
    driver.take_sent(Prefill)
    assert entries(driver, prompt("b")) == ["p0"]
    room(driver, target, BLOCKS)
    assert entries(driver, prompt("c")) == [target]


# ---------------------------------------------------------------- without prefill nodes


def test_decode_nodes_serve_alone() -> None:
    driver = Driver("d0", local_prefill_tokens=PROMPT_LEN)
    assert driver.machine.unready_reason() is None
    assert entries(driver, prompt("r")) == ["d0"]
    driver.tokens("d0", 0, [1, 2])
    driver.tokens("d0", 2, [3], finish=FinishReason.STOP)
    assert driver.output() == [1, 2, 3]
    driver.machine.assert_quiescent()


@pytest.mark.parametrize("nodes", ["", "p0"])
def test_without_decode_nodes_nothing_is_served_all_the_same(nodes: str) -> None:
    driver = Driver(nodes, local_prefill_tokens=0)
    assert "no decode" in (driver.machine.unready_reason() or "")
    driver.now += 60.0  # a router that has just started waits for nodes
    driver.submit()
    assert driver.error_code() == "no_node_available"


def test_alone_they_share_the_prompts_and_those_with_room_come_first() -> None:
    driver = Driver("d0 d1", local_prefill_tokens=PROMPT_LEN)
    assert entries(driver, *(prompt(f"r{i}") for i in range(4))) == ["d0", "d1", "d0", "d1"]
    room(driver, "d0", 0)
    room(driver, "d1", 1000)
    assert entries(driver, prompt("a"), prompt("b")) == ["d1", "d1"]


def test_a_pool_that_could_never_hold_the_prompt_comes_last() -> None:
    driver = Driver(local_prefill_tokens=0)
    driver.join("d0", num_blocks=BLOCKS - 2)
    driver.join("d1", num_blocks=BLOCKS - 1)
    assert entries(driver, prompt("a"), prompt("b"), prompt("c")) == ["d1", "d1", "d1"]


def test_a_dead_prefill_node_s_prompts_go_to_a_decode_node_at_once() -> None:
    driver = lending("p0 d0", 10 * PROMPT_LEN)
    assert entries(driver, prompt("r")) == ["p0"]
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    assert entry(driver) == "d0"
    assert driver.machine.unready_reason() is None
    driver.tokens("d0", 0, [1], epoch=2, finish=FinishReason.STOP)
    driver.machine.assert_quiescent()


def test_a_request_that_waits_for_a_node_goes_to_a_decode_node_that_comes() -> None:
    driver = lending("d0", 0)
    assert entries(driver, prompt("r")) == ["d0"]
    driver.do(PeerLost(PeerId(peer("d0")), "killed"))
    assert driver.take_sent(Generate) == []
    driver.join("d0", "b")
    assert entry(driver) == "d0"


# ---------------------------------------------------------------- failures


def test_a_decode_node_that_failed_it_computes_it_no_more_while_there_is_a_prefill_node() -> None:
    driver = lending("p0 d0", 0, limits=Limits(max_attempts=4, peer_timeout_s=2.0))
    assert entries(driver, prompt("r")) == ["d0"]
    driver.fail("d0")
    driver.wait(1.0)
    assert entry(driver) == "p0"
    driver.fail("p0", epoch=2)
    driver.wait(3.0)
    assert entry(driver) == "p0"


def test_another_decode_node_computes_what_all_prefill_nodes_have_failed() -> None:
    """And soon: it is not among those that failed it, so there is nothing to wait for."""
    driver = lending("p0 d0 d1 d2", 10 * PROMPT_LEN, limits=Limits(max_attempts=4, peer_timeout_s=60.0))
    driver.submit(prompt("r"))
    [(_, message)] = driver.take_sent(Prefill)
    assert message.decode_node is not None
    tried = [message.decode_node.peer.partition("#")[0]]
    driver.fail("p0")
    for epoch in (2, 3):
        driver.wait(1.0)
        tried.append(entry(driver))
        driver.fail(tried[-1], epoch=epoch)
    assert sorted(tried) == ["d0", "d1", "d2"]
    driver.wait(1.0)
    assert driver.take_sent(Prefill) == []


def test_a_decode_node_dies_while_it_computes_a_prompt() -> None:
    driver = lending("p0 d0 d1")
    assert entries(driver, prompt("a", max_tokens=1), prompt("b")) == ["p0", "d0"]
    driver.tokens("d0", 0, [1], epoch=2, request_id="b")
    driver.do(PeerLost(PeerId(peer("d0")), "killed"))
    [(to, again)] = driver.take_sent(Generate)
    assert (to, again.request.epoch, again.request.output_token_ids) == (peer("d1"), 3, [1])
    driver.tokens("d1", 1, [2], epoch=3, request_id="b", finish=FinishReason.STOP)
    assert driver.output("b") == [1, 2]
    driver.tokens("p0", 0, [1], request_id="a", finish=FinishReason.LENGTH)
    driver.machine.assert_quiescent()


def test_a_decode_node_that_leaves_computes_nothing() -> None:
    driver = lending("p0 d0 d1", 0)
    driver.receive(peer("d0"), Leaving())
    assert entries(driver, prompt("a")) == ["d1"]
    driver.receive(peer("d1"), Leaving())
    driver.submit(prompt("b"))
    assert not driver.take_sent(Prefill) and not driver.take_sent(Generate)


@pytest.mark.parametrize("how", [ClientGone, StopMatched])
def test_whoever_ends_it_ends_it_on_the_decode_node_alone(how: type[ClientGone] | type[StopMatched]) -> None:
    driver = lending("p0 d0")
    assert entries(driver, prompt("a"), prompt("b")) == ["p0", "d0"]
    driver.tokens("d0", 0, [1], epoch=2, request_id="b")
    driver.do(how(RequestId("b")))
    assert driver.take_sent(Abort) == [(peer("d0"), Abort(request_id=RequestId("b"), epoch=2))]
    driver.do(ClientGone(RequestId("a")))
    driver.machine.assert_quiescent()


def test_one_that_is_preempted_moves_on_like_any_other() -> None:
    driver = lending("p0 d0 d1")
    room(driver, "d0", 1001)
    assert entries(driver, prompt("a"), prompt("b")) == ["p0", "d0"]
    driver.tokens("d0", 0, [1], epoch=2, request_id="b")
    driver.receive(peer("d0"), RequestPreempted(request_id=RequestId("b"), epoch=2, num_blocks=8))
    [(to, generate)] = driver.take_sent(Generate)
    assert (to, generate.request.output_token_ids) == (peer("d1"), [1])
    counters = driver.machine.requests.counters
    assert (counters.moved, counters.local_prefills) == (1, 1)


# ---------------------------------------------------------------- for people


def test_the_timeline_says_so() -> None:
    driver = lending("p0 d0")
    entries(driver, prompt("a"), prompt("b"))
    marks = {}
    for request_id in "ab":
        timeline = driver.machine.requests.timelines.get(RequestId(request_id))
        assert timeline is not None
        assert isinstance(timeline["marks"], list)
        marks[request_id] = [mark["name"] for mark in timeline["marks"]]
    assert marks == {"a": ["received", "dispatched"], "b": ["received", "dispatched", "local_prefill"]}


# ---------------------------------------------------------------- the setting


@pytest.mark.parametrize(("given", "expected"), [({}, None), ({"local_prefill_tokens": 512}, 512)])
def test_the_machine_gets_what_the_config_says(given: dict[str, int], expected: int | None) -> None:
    nodes = [{"name": "p0", "role": "prefill", "port": 1}, {"name": "d0", "role": "decode", "port": 2}]
    config = ClusterConfig.from_data({"router": given, "nodes": nodes})
    assert router_settings(config, "a").local_prefill_tokens == expected


def test_it_cannot_be_negative() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        RouterConfig(local_prefill_tokens=-1)
