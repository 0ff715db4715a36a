"""Routing policies, and the load and the prefix caches of nodes that they decide by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from driver import Driver, new_request, peer
from fake_nodes import GEOMETRY, register

from kvrelay.config.sections import RoutingPolicy
from kvrelay.machine.contract import PeerLost
from kvrelay.protocol.block_hash import PREFIX_KEY_BYTES, BlockHasher
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, Load
from kvrelay.protocol.messages.node_to_router import PrefixCacheChanged
from kvrelay.protocol.messages.router_to_node import Prefill, Registered
from router.node_table import Node
from router.policies import (
    UNCACHED_WEIGHT,
    CacheAware,
    LeastLoaded,
    PowerOfTwo,
    RandomChoice,
    RoundRobin,
    Session,
)
from router.policy import REQUEST_TOKENS
from router.prefixes import EXPECTED_HEARTBEATS, NodePrefixes
from router.request import MAX_ROUTED_BLOCKS, RoutedRequest

BLOCK = GEOMETRY.block_size


def prompt(num_tokens: int = 1, *, first: int = 0, session: str = "") -> RoutedRequest:
    new = new_request(prompt=[first + i for i in range(num_tokens)])
    return RoutedRequest(type(new)(new.request_id, new.prompt_token_ids, new.sampling, session=session), 0.0)


def keys(token_ids: list[int]) -> list[bytes]:
    hashes = BlockHasher(GEOMETRY.model_digest, BLOCK).hashes(token_ids)
    return [block_hash[:PREFIX_KEY_BYTES] for block_hash in hashes]


def changed(number: int, added: list[bytes], removed: list[bytes] | None = None) -> PrefixCacheChanged:
    return PrefixCacheChanged(number=number, added=b"".join(added), removed=b"".join(removed or []))


def by_id(pending: dict[str, int] | None) -> dict[RequestId, int]:
    return {RequestId(name): num_tokens for name, num_tokens in (pending or {}).items()}


def node(node_id: str, *, pending: dict[str, int] | None = None, max_num_seqs: int = 8, **load: Any) -> Node:
    found = Node(PeerId(peer(node_id)), register(node_id, "decode", max_num_seqs=max_num_seqs), pending=by_id(pending))
    found.take_load(Load(**load))
    return found


def test_least_loaded_counts_prompts_to_compute_and_requests() -> None:
    idle, long_prompt, many = node("a"), node("b", pending={"r": 900}), node("c", pending=dict.fromkeys("rst", 0))
    assert LeastLoaded().choose([many, long_prompt, idle], prompt()) is idle
    assert LeastLoaded().choose([long_prompt, many], prompt()) is many


def test_least_loaded_heeds_what_heartbeats_tell_of_others_requests() -> None:
    assert LeastLoaded().choose([busy := node("a", num_running=4), idle := node("b")], prompt()) is idle
    assert busy.num_requests == 4


def test_a_heartbeat_from_before_the_end_of_a_request_does_not_count_it() -> None:
    served = node("a", pending={"mine": 0, "yours": 0}, num_running=3)
    del served.pending[RequestId("mine")]
    assert served.num_requests == 2


def test_least_loaded_gives_larger_nodes_more() -> None:
    small, large = node("a", pending={"r": 0}, max_num_seqs=2), node("b", pending={"r": 0, "s": 0}, max_num_seqs=16)
    assert LeastLoaded().choose([small, large], prompt()) is large


def test_least_loaded_takes_turns_between_equals() -> None:
    policy, nodes = LeastLoaded(), [node("a"), node("b"), node("c")]
    assert [policy.choose(nodes, prompt()).node_id for _ in range(4)] == ["a", "b", "c", "a"]


def shortest_first(node_id: str, pending: dict[str, int] | None = None, role: str = "prefill", **load: Any) -> Node:
    registration = register(node_id, role, prefill_order="shortest_first")
    found = Node(PeerId(peer(node_id)), registration, pending=by_id(pending))
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
    assert (
        LeastLoaded().choose([long, short], prompt(1000)) is short
    )  # it waits for 300 there; delays the other by 1,000
    many = shortest_first("a", dict.fromkeys("rstuvw", 2000))
    assert LeastLoaded().choose([many, short], prompt(400)) is short
    in_order = Node(PeerId("x"), register("x", "prefill"), pending=by_id({"r": 9000}))
    assert in_order.added_wait(100) == 9000
    assert long.added_wait(100) == 100
    assert LeastLoaded().choose([in_order, long], prompt(100)) is long


def test_a_decode_node_is_chosen_by_all_the_prompt_tokens_it_must_compute() -> None:
    busy = shortest_first("d0", {"r": 9000, "s": 0}, role="decode")
    less = shortest_first("d1", {"r": 300, "s": 0}, role="decode")
    assert LeastLoaded().choose([busy, less], prompt(10)) is less


def test_round_robin_goes_round_by_name_whoever_comes_and_goes() -> None:
    policy, (a, b, c) = RoundRobin(), (node("a"), node("b"), node("c"))
    assert [policy.choose([c, a, b], prompt()).node_id for _ in range(4)] == ["a", "b", "c", "a"]
    assert policy.choose([a, c], prompt()).node_id == "c"


def test_policies_are_picked_for_prefill_and_decode_apart() -> None:
    driver = Driver("p0 p1 d0 d1", policy="round_robin")
    pairs = []
    for i in range(3):
        driver.submit(new_request(f"r{i}"))
        entry, decode, _ = driver.dispatched()
        pairs.append((entry, decode))
    assert pairs == [(peer("p0"), peer("d0")), (peer("p1"), peer("d1")), (peer("p0"), peer("d0"))]


def test_random_and_power_of_two_use_all_nodes_and_repeat_with_the_seed() -> None:
    nodes = [node("a"), node("b"), node("c")]
    for policy in (RandomChoice, PowerOfTwo):
        chosen = [[one.choose(nodes, prompt()).node_id for _ in range(40)] for one in (policy(1), policy(1), policy(2))]
        assert set(chosen[0]) == {"a", "b", "c"}
        assert chosen[0] == chosen[1] != chosen[2]


def test_power_of_two_never_chooses_the_most_loaded() -> None:
    nodes = [node("a", pending={"r": 900}), node("b"), node("c", pending={"r": 100})]
    policy = PowerOfTwo(0)
    assert {policy.choose(nodes, prompt()).node_id for _ in range(40)} == {"b", "c"}
    assert policy.choose(nodes[:1], prompt()).node_id == "a"


def test_a_session_stays_on_its_node_and_only_sessions_of_a_leaving_node_move() -> None:
    policy, nodes = Session(), [node(name) for name in "abcd"]
    sessions = [f"user {index}" for index in range(40)]
    first = {name: policy.choose(nodes, prompt(session=name)).node_id for name in sessions}
    assert set(first.values()) == set("abcd")
    again = {name: policy.choose(nodes[::-1], prompt(99, session=name)).node_id for name in sessions}
    assert again == first
    without = {name: policy.choose(nodes[1:], prompt(session=name)).node_id for name in sessions}
    assert all(without[name] == first[name] for name in sessions if first[name] != "a")


def test_requests_without_a_session_go_by_load() -> None:
    assert Session().choose([node("a", pending={"r": 900}), idle := node("b")], prompt()) is idle


# ---------------------------------------------------------------- prefix caches


def test_a_node_has_the_prefix_that_it_reported() -> None:
    prefixes, mine = NodePrefixes(), keys(list(range(10 * BLOCK)))
    assert prefixes.num_cached_blocks(mine) == 0
    assert prefixes.take(changed(0, mine[:4]))
    assert prefixes.take(changed(1, mine[4:6]))
    assert prefixes.num_cached_blocks(mine) == 6
    assert prefixes.take(changed(2, [], mine[5:6]))
    assert prefixes.num_cached_blocks(mine) == 5
    assert prefixes.num_cached_blocks(keys(list(range(1, 10 * BLOCK)))) == 0


def test_after_a_lost_report_nothing_counts_until_the_whole_comes_again() -> None:
    prefixes, mine = NodePrefixes(), keys(list(range(4 * BLOCK)))
    prefixes.take(changed(0, mine[:2]))
    assert not prefixes.take(changed(2, mine[2:]))
    assert prefixes.num_cached_blocks(mine) == 0
    assert not prefixes.take(changed(3, mine[2:]))
    assert prefixes.take(changed(0, mine))
    assert prefixes.num_cached_blocks(mine) == 4


def test_a_prompt_counts_as_cached_from_when_it_is_sent_until_it_should_have_been_reported() -> None:
    prefixes, mine = NodePrefixes(), keys(list(range(4 * BLOCK)))
    prefixes.take(changed(0, []))
    prefixes.expect(mine[:2])
    for _ in range(EXPECTED_HEARTBEATS):
        prefixes.count_heartbeat()
        prefixes.expect(mine)
    assert prefixes.num_cached_blocks(mine) == 4
    for _ in range(EXPECTED_HEARTBEATS):
        prefixes.count_heartbeat()
    assert prefixes.num_cached_blocks(mine) == 4
    prefixes.count_heartbeat()
    assert prefixes.num_cached_blocks(mine) == 0


def with_prefix(name: str, role: str, tokens: list[int], **registration: Any) -> Node:
    found = Node(PeerId(peer(name)), register(name, role, **registration))
    found.prefixes.take(changed(0, keys(tokens)))
    return found


def test_a_prompt_goes_where_its_prefix_is_unless_the_wait_there_is_much_longer_than_computing_it() -> None:
    request = prompt(10 * BLOCK)
    has, lacks = with_prefix("a", "prefill", request.new.prompt_token_ids[: 8 * BLOCK]), with_prefix("b", "prefill", [])
    assert CacheAware().choose([lacks, has], request) is has
    has.pending[RequestId("other")] = 8 * UNCACHED_WEIGHT * BLOCK - REQUEST_TOKENS - 1
    assert CacheAware().choose([lacks, has], request) is has
    has.pending[RequestId("other")] += 2
    assert CacheAware().choose([lacks, has], request) is lacks


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_without_prefixes_cache_aware_goes_by_load(role: str) -> None:
    busy = Node(PeerId("a"), register("a", role), pending=by_id({"r": 900}))
    assert CacheAware().choose([busy, idle := Node(PeerId("b"), register("b", role))], prompt(100)) is idle


def test_a_decode_node_without_blocks_for_the_rest_of_the_prompt_comes_last() -> None:
    request = prompt(10 * BLOCK)
    full, roomy = with_prefix("a", "decode", request.new.prompt_token_ids[: 4 * BLOCK]), with_prefix("b", "decode", [])
    assert CacheAware().choose([roomy, full], request) is full  # nothing is known of its room yet
    for found, free in ((full, 5), (roomy, 50)):
        found.take_load(Load(free_blocks=free))
        found.num_heartbeats = 1
    assert CacheAware().choose([roomy, full], request) is roomy


def test_the_router_asks_for_prefixes_only_if_a_policy_uses_them() -> None:
    cases: dict[RoutingPolicy, bool] = {"least_loaded": False, "session": False, "cache_aware": True}
    for policy, wanted in cases.items():
        driver = Driver("p0 d0", policy=policy)
        registered = [message for _, message in driver.sent if isinstance(message, Registered)]
        assert [message.wants_prefixes for message in registered] == [wanted, wanted]


def reporting(nodes: str) -> Driver:
    """Return a router with ``nodes`` whose prefix caches are empty."""
    driver = Driver(nodes, policy="cache_aware")
    for name in nodes.split():
        driver.receive(peer(name), changed(0, []))
    return driver


def test_nothing_is_expected_of_nodes_without_prefix_caching() -> None:
    driver = Driver("p0 p1 d0", policy="cache_aware")
    for index in range(4):
        driver.submit(new_request(f"r{index}", prompt=list(range(8 * BLOCK))))
    sent = [to for to, message in driver.sent if isinstance(message, Prefill)]
    assert sorted(sent) == [peer("p0"), peer("p0"), peer("p1"), peer("p1")]


def test_equal_prompts_go_to_one_node_and_others_elsewhere() -> None:
    driver = reporting("p0 p1 d0")
    first, second = list(range(8 * BLOCK)), list(range(1000, 1000 + 8 * BLOCK))
    driver.submit(new_request("r0", prompt=first))
    driver.submit(new_request("r1", prompt=second))
    driver.submit(new_request("r2", prompt=second))
    driver.submit(new_request("r3", prompt=first))
    sent = {str(m.request.request_id): to for to, m in driver.sent if isinstance(m, Prefill)}
    assert sent == {"r0": sent["r0"], "r3": sent["r0"], "r1": sent["r1"], "r2": sent["r1"]}
    assert sent["r0"] != sent["r1"]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of blocks hashed for each prompt."""
    counts: list[int] = []
    hashes = BlockHasher.hashes

    def counted(self: BlockHasher, token_ids: Sequence[int]) -> list[bytes]:
        counts.append(len(token_ids) // self.block_size)
        return hashes(self, token_ids)

    monkeypatch.setattr(BlockHasher, "hashes", counted)
    return counts


@pytest.mark.parametrize("waits", [False, True])
def test_prompts_that_are_dispatched_together_share_the_blocks_that_are_hashed(hashed: list[int], waits: bool) -> None:
    driver = Driver("d0" if waits else "p0 d0", policy="cache_aware")
    tokens = list(range(MAX_ROUTED_BLOCKS // 2 * BLOCK))
    driver.submit(*(new_request(f"r{index}", prompt=tokens) for index in range(4)))
    if waits:
        driver.join("p0")
    assert sum(isinstance(message, Prefill) for _, message in driver.sent) == 4
    assert hashed == [MAX_ROUTED_BLOCKS // 4] * 4


def test_one_long_prompt_is_compared_with_all_the_blocks(hashed: list[int]) -> None:
    driver = Driver("p0 d0", policy="cache_aware")
    driver.submit(new_request(prompt=list(range((MAX_ROUTED_BLOCKS + 2) * BLOCK))))
    assert hashed == [MAX_ROUTED_BLOCKS]


def test_only_uncached_tokens_are_pending_on_the_node() -> None:
    driver = Driver("p0 d0", policy="cache_aware")
    tokens = list(range(8 * BLOCK))
    driver.receive(peer("p0"), changed(0, keys(tokens)[:6]))
    driver.submit(new_request("r", prompt=tokens))
    p0 = driver.machine.node_table.get(PeerId(peer("p0")))
    assert p0 is not None
    assert p0.pending == {"r": 2 * BLOCK}


def test_a_node_whose_report_was_missed_begins_anew_and_a_restarted_one_has_no_prefixes() -> None:
    driver = Driver("p0 d0", policy="cache_aware")
    mine = keys(list(range(4 * BLOCK)))
    driver.receive(peer("p0"), changed(0, mine))
    driver.receive(peer("p0"), changed(2, mine))
    to, message = driver.sent[-1]
    assert to == peer("p0")
    assert isinstance(message, Registered)
    assert message.wants_prefixes
    driver.receive(peer("p0"), changed(0, mine))
    driver.receive(peer("p0"), Heartbeat(load=Load()))
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    driver.join("p0", "b")
    node_table = driver.machine.node_table
    p0 = node_table.get(PeerId(peer("p0", "b")))
    assert p0 is not None
    assert p0.prefixes.num_cached_blocks(mine) == 0
