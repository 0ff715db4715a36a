"""Routing by predicted times to first token: speeds that nodes measure, and what follows from them, whatever fails."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.many_routers import ManyRouters
from support.world import World

from router.node_table import Node

ROUTING = {"prefill_routing": "ttft", "decode_routing": "ttft"}
SLOW = {"engine": {"prefill_token_s": 0.002}}
"""A twentieth of the speed of the others."""


def cluster(seed: int = 0, **options: Any) -> World:
    router = {**ROUTING, **options.pop("router", {})}
    return World(seed, **{"prefill": 2, "decode": 2, "careful": True, "router": router, **options})


def known(world: World, name: str) -> Node:
    """Return what the router knows of a node."""
    return {str(node.node_id): node for node in world.router.machine.node_table}[name]


def warm_up(world: World, count: int = 12) -> None:
    """Serve some prompts, one after another, and let nodes report how fast that was."""
    for _ in range(count):
        world.submit(40, 4)
        world.settle()
    world.run_for(2.5)


def test_nodes_report_the_speeds_that_they_measure() -> None:
    with cluster(nodes={"p1": SLOW}, cache={"prefix_caching": False}) as world:
        assert known(world, "p0").load.prefill_tokens_per_s == 0.0
        warm_up(world)
        speeds = {name: known(world, name).load.prefill_tokens_per_s for name in ("p0", "p1", "d0")}
        assert speeds == {"p0": pytest.approx(40 / 0.005), "p1": pytest.approx(40 / 0.081), "d0": 0.0}
        links = known(world, "p0").load.link_bytes_per_s
        assert set(links) <= {"d0", "d1"}
        assert min(links.values()) > 0


def test_a_slow_node_gets_what_it_can_compute_as_soon_as_the_others() -> None:
    with cluster(nodes={"p1": SLOW}) as world:
        warm_up(world)
        clients = [world.submit(40, 4) for _ in range(40)]
        used = [client.nodes[0] for client in clients]
        assert used.count("p1") in (1, 2, 3)  # of 40, where equal nodes would get 20 each
        world.settle()


def test_a_node_that_restarts_is_not_judged_by_what_it_was() -> None:
    with cluster(nodes={"p1": SLOW}) as world:
        warm_up(world)
        assert world.submit(40, 4).nodes[0] == world.submit(40, 4).nodes[0] == "p0"
        world.settle()
        world.restart("p1")
        world.run_for(10.0)
        assert known(world, "p1").load.prefill_tokens_per_s == 0.0
        assert not known(world, "p1").prefixes.reported
        assert "p1" in {world.submit(40, 4).nodes[0] for _ in range(2)}
        world.settle()


def test_only_as_many_prompts_are_accepted_as_can_be_computed_in_time() -> None:
    with cluster(prefill=1, decode=1, limits={"ttft_slo_s": 0.1}, cache={"num_blocks": 2000}) as world:
        warm_up(world)
        clients = [world.submit(60, 1) for _ in range(60)]
        refused = [client for client in clients if client.error is not None]
        assert {client.error for client in refused} == {"ttft_limit_exceeded"}
        assert all(client.ended_s == client.submitted_s and not client.nodes for client in refused)
        assert 10 <= len(clients) - len(refused) <= 16  # 60 tokens take 7 ms
        world.settle()
        assert all(client.ended_s - client.submitted_s <= 0.12 for client in clients if client not in refused)
        again = world.submit(60, 1)
        assert again.error is None
        world.settle()
        assert world.router.machine.requests.counters.refused_for_ttft == len(refused)


def test_first_tokens_come_about_when_they_were_predicted() -> None:
    with cluster(cache={"num_blocks": 2000}, scheduler={"prefill_order": "fifo"}) as world:
        warm_up(world)
        before = sum(found.total for found in errors(world))
        clients = [world.submit(world.rng.randint(20, 60), 1) for _ in range(40)]
        world.settle()
        waits = sum(client.ended_s - client.submitted_s for client in clients)
        assert sum(found.total for found in errors(world)) - before < 0.3 * waits


def errors(world: World) -> list[Any]:
    return list(world.router.machine.requests.prediction_errors.values())


def test_a_mixed_cluster_shares_prompts_between_both_kinds_of_nodes() -> None:
    with cluster(prefill=1, decode=1, mixed=1) as world:
        warm_up(world)
        clients = [world.submit(40, 4) for _ in range(10)]
        assert {tuple(client.nodes) for client in clients} == {("p0", "d0"), ("m0",)}
        world.settle()


def test_a_decode_node_computes_prompts_when_that_is_sooner() -> None:
    with cluster(prefill=1, decode=1, router={"local_prefill_tokens": 0}, nodes={"p0": SLOW}) as world:
        world.run_for(1.5)
        warm_up(world)
        assert world.submit(40, 4).nodes == ["d0"]
        world.settle()
        assert known(world, "d0").load.prefill_tokens_per_s > known(world, "p0").load.prefill_tokens_per_s > 0


@pytest.mark.parametrize("seed", range(4))
def test_several_routers_share_the_nodes(seed: int) -> None:
    with ManyRouters(seed, routers=2, prefill=2, decode=2, router=ROUTING, limits={"ttft_slo_s": 5.0}) as world:
        world.run_for(1.5)
        for number in range(24):
            world.submit_to(number % 2, world.rng.randrange(3, 40), 20)
            world.run_for(world.rng.choice([0.0, 0.0, 0.7]))
        world.settle()
        assert all(client.error is None for client in world.clients.values())
        for router in world.routers:
            assert {node.num_requests for node in router.machine.node_table} == {0}


@pytest.mark.fault("F05", "F07", "F19")
@pytest.mark.parametrize("seed", range(16))
def test_faults_and_deaths_at_random(seed: int) -> None:
    """Whatever nodes there are, and with a limit that some prompts exceed."""
    rng = random.Random(seed)
    shape = {"prefill": rng.randint(1, 2), "decode": rng.randint(1, 2), "mixed": rng.randint(0, 1)}
    limits = {"request_timeout_s": 100.0, "max_attempts": 10, "ttft_slo_s": rng.choice([None, 0.02])}
    router = {"local_prefill_tokens": rng.choice([None, 0, 40])}
    with cluster(seed, **shape, limits=limits, router=router, cache={"num_blocks": rng.randint(24, 64)}) as world:
        world.link.disturb(drop=0.003, duplicate=0.02, overtake=0.02, delay=0.02)
        for _ in range(4):
            for _ in range(rng.randint(4, 10)):
                world.submit(rng.randint(1, 60), rng.randint(1, 20))
            world.run_for(rng.random() * 0.03)
            if rng.random() < 0.5:
                world.restart(rng.choice(sorted(world.nodes)))
            world.run_for(rng.choice([0.0, 1.5]))
        world.settle_clients(150.0)
        world.link.heal()
        world.settle(60.0)
