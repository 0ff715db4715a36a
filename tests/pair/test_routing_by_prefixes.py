"""Routing by prefix caches: what the router knows of them, and where prompts go, under faults of the network."""

from __future__ import annotations

import pytest
from support.world import World

from kvrelay.protocol.block_hash import PREFIX_KEY_BYTES


def cluster(seed: int = 0, **options: object) -> World:
    routing = {"prefill_routing": "cache_aware", "decode_routing": "cache_aware"}
    return World(seed, prefill=2, decode=2, router=routing, **options)  # type: ignore[arg-type]


def check_prefixes(world: World) -> None:
    """The router knows of every node exactly the blocks that the node has published."""
    known = {str(node.node_id): node.prefixes for node in world.router.machine.node_table}
    for name, process in world.nodes.items():
        published = {block_hash[:PREFIX_KEY_BYTES] for block_hash in process.machine.kv.published()}
        assert known[name].reported == published, f"{name}: the router and the node disagree"


def test_the_turns_of_a_chat_go_to_the_nodes_that_have_it() -> None:
    with cluster() as world:
        chats = [world.prompt(20) for _ in range(4)]
        nodes: list[set[tuple[str, ...]]] = [set() for _ in chats]
        for turn in range(3):
            clients = [world.submit(chat, 4, eos_token_ids=[]) for chat in chats]
            world.settle()
            for chat, client, used in zip(chats, clients, nodes, strict=True):
                used.add(tuple(client.nodes))
                chat.extend(client.token_ids + world.prompt(5))
                assert (client.num_cached_tokens > 0) is (turn > 0)
            world.run_for(2.0)
            check_prefixes(world)
        assert [len(used) for used in nodes] == [1, 1, 1, 1]
        assert len({name for used in nodes for (name, *_) in used}) == 2  # and chats use both prefill nodes


def test_nodes_without_prefix_caching_share_equal_prompts() -> None:
    with cluster(cache={"prefix_caching": False}) as world:
        prompt, used = world.prompt(20), []
        for _ in range(4):
            client = world.submit(prompt, 4)
            world.settle()
            used.append(client.nodes[0])
        assert {used.count(name) for name in set(used)} == {2}


@pytest.mark.fault("F19")
@pytest.mark.parametrize("seed", range(8))
def test_evictions_are_reported(seed: int) -> None:
    with cluster(seed, cache={"num_blocks": 24}) as world:
        for _ in range(12):
            world.submit(world.rng.randint(5, 40), 8)
            world.run_for(world.rng.random())
        world.settle()
        world.run_for(2.0)
        check_prefixes(world)
        assert any(process.machine.kv.stats.evicted_blocks for process in world.nodes.values())


@pytest.mark.fault("F16", "F19")
@pytest.mark.parametrize("nth", [1, 5, 6, 8])
@pytest.mark.parametrize("fault", ["drop", "duplicate"])
def test_a_report_is_lost_or_comes_twice(fault: str, nth: int) -> None:
    """The first four are empty. The next report shows it, and the router learns the whole prefix cache anew."""
    with cluster() as world:
        if fault == "drop":
            done = world.link.drop("PrefixCacheChanged", nth)
        else:
            done = world.link.duplicate("PrefixCacheChanged", 0.0, nth)
        for _ in range(6):
            world.submit(20, 4)
            world.settle()
            world.run_for(1.5)
        assert done.num_seen >= nth
        world.link.heal()
        for _ in range(4):
            world.submit(20, 4)
            world.settle()
            world.run_for(1.5)
        world.run_for(2.0)
        check_prefixes(world)


@pytest.mark.fault("F19")
def test_a_router_that_restarts_learns_the_prefix_caches() -> None:
    with cluster() as world:
        for _ in range(4):
            world.submit(20, 4)
        world.settle()
        world.restart_router()
        world.run_until(world.is_ready)
        world.run_for(3.0)
        check_prefixes(world)


@pytest.mark.fault("F19")
def test_a_node_that_restarts_begins_with_an_empty_prefix_cache() -> None:
    with cluster() as world:
        for _ in range(4):
            world.submit(20, 4)
        world.settle()
        world.run_for(2.0)
        world.restart("p0")
        world.run_for(10.0)
        check_prefixes(world)
        assert not {str(n.node_id): n.prefixes for n in world.router.machine.node_table}["p0"].reported


@pytest.mark.fault("F19")
@pytest.mark.parametrize("seed", range(4))
def test_the_router_still_expects_blocks_that_are_gone(seed: int) -> None:
    """The prompt goes to the node that had it and is computed anew. The next report shows that one was lost."""
    with cluster(seed, cache={"num_blocks": 24}, engine={"eos_every": 0}) as world:
        prompt = world.prompt(40)
        name = world.submit(prompt, 4).nodes[0]
        world.settle()
        world.run_for(2.0)
        expected = {str(node.node_id): node.prefixes for node in world.router.machine.node_table}[name].reported
        kept = expected.copy()
        untold = world.link.drop("PrefixCacheChanged", source=name)
        for _ in range(10):
            world.submit(40, 4)
            world.run_for(0.05)
        world.settle()
        assert kept <= expected
        assert not kept <= {key[:PREFIX_KEY_BYTES] for key in world.nodes[name].machine.kv.published()}
        again = world.submit(prompt, 4)
        world.settle()
        assert (again.nodes[0], again.error) == (name, None)
        world.link.faults.remove(untold)
        for _ in range(4):
            world.submit(40, 4)
            world.run_for(1.0)
        world.settle()
        world.run_for(4.0)
        check_prefixes(world)


def test_nodes_record_nothing_for_a_router_that_does_not_ask() -> None:
    with World() as world:
        world.submit(20, 4)
        world.settle()
        assert all(process.machine.kv.take_changes() == ([], []) for process in world.nodes.values())


@pytest.mark.parametrize("policy", ["random", "power_of_two", "session", "round_robin", "cache_aware", "ttft"])
@pytest.mark.parametrize("seed", range(4))
def test_every_policy_serves_under_faults(policy: str, seed: int) -> None:
    with World(seed, prefill=2, decode=2, router={"prefill_routing": policy, "decode_routing": policy}) as world:
        world.link.disturb(drop=0.01, duplicate=0.02, delay=0.05)
        for number in range(12):
            world.submit(world.rng.randint(5, 40), 8, session=f"session {number % 3}")
            if number == 6:
                world.kill("p0" if seed % 2 else "d0")
            world.run_for(0.05)
        world.link.heal()
        world.settle_clients()
        errors = [client.error for client in world.clients.values() if client.error is not None]
        assert len(errors) <= 4  # of messages that are given up when they are lost
