"""Several routers over the same nodes, and a registry that comes and goes: nobody's trouble is another's."""

from __future__ import annotations

import pytest
from support.many_routers import LEASE_S, POLL_S, ManyRouters

from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import StopRequested
from kvrelay.protocol.messages.node_to_router import Register

SEEDS = range(8)
PEER_TIMEOUT_S = 5.0
FEW = {"num_blocks": 48}


def submit_some(world: ManyRouters, count: int = 6, max_tokens: int = 30) -> None:
    for number in range(count):
        world.submit_to(number % len(world.routers), world.rng.randrange(3, 40), max_tokens)


@pytest.mark.parametrize("seed", SEEDS)
def test_routers_share_prefill_decode_and_mixed_nodes(seed: int) -> None:
    with ManyRouters(seed, routers=3, prefill=2, decode=2, mixed=1, cache=FEW) as world:
        for _ in range(4):
            submit_some(world)
            world.run_for(world.rng.random() * 0.05)
        world.settle()
        assert all(client.error is None for client in world.clients.values())


@pytest.mark.fault("F14")
@pytest.mark.parametrize("nodes", [{}, {"prefill": 0, "decode": 0, "mixed": 1}])
def test_clients_that_give_two_routers_one_id_get_each_its_own_answer(nodes: dict[str, int]) -> None:
    with ManyRouters(**nodes) as world:
        clients = [world.submit_to(number, 9 + number, 20, "mine") for number in range(2)]
        world.settle()
        assert [client.error for client in clients] == [None, None]
        assert clients[0].token_ids != clients[1].token_ids


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [{"prefill": 2, "decode": 2}, {"prefill": 0, "decode": 0, "mixed": 2}])
def test_a_router_dies_and_only_its_own_requests_end(seed: int, nodes: dict[str, int]) -> None:
    """At a random moment. ``with`` asserts that no node holds anything for the dead router in the end."""
    with ManyRouters(seed, cache=FEW, **nodes) as world:
        submit_some(world, 8, 60)
        world.run_for(world.rng.random() * 0.06)
        world.kill_router(0)
        submit_some(world, 2)
        killed_s = world.now
        world.settle_clients()
        assert world.now - killed_s < PEER_TIMEOUT_S, "the survivor's requests waited for the dead router"
        assert all(client.error is None for client in world.clients.values())
        assert world.routers[0].machine.requests.counters.retries == 0


def test_the_blocks_of_a_dead_router_are_back_as_soon_as_anything_is_said_to_it() -> None:
    with ManyRouters() as world:
        world.submit_to(0, 20, 200)
        world.run_until_sent("TokensOut", 3)
        world.kill_router(0)
        world.run_for(0.1)
        world.nodes["d0"].machine.assert_quiescent()


def test_a_router_that_is_only_silent_is_given_up_in_the_end() -> None:
    """Its machine hangs and its sockets do not: nothing that is sent to it fails."""
    with ManyRouters(engine={"decode_token_s": 0.1, "eos_every": 0}) as world:
        client = world.submit_to(0, 20, 100)
        world.run_until_sent("TokensOut", 3)
        world.routers[0].pause()
        world.run_for(PEER_TIMEOUT_S - 1.5)
        assert world.nodes["d0"].machine.load().num_running == 1
        world.run_for(3.0)
        world.nodes["d0"].machine.assert_quiescent()
        world.routers[0].resume()
        world.settle()
        assert client.error is None


@pytest.mark.fault("F09")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pause_s", [3.0, 8.0])
def test_a_router_that_stops_for_a_while_loses_no_request(seed: int, pause_s: float) -> None:
    with ManyRouters(seed, prefill=2, decode=2, engine={"decode_token_s": 0.02}) as world:
        submit_some(world, 6, 200)
        world.run_for(world.rng.random())
        world.routers[0].pause()
        world.run_for(pause_s)
        world.routers[0].resume()
        world.settle()
        assert all(client.error is None for client in world.clients.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_nodes_come_and_go_and_every_router_knows_within_the_lease(seed: int) -> None:
    with ManyRouters(seed, prefill=2, decode=2) as world:
        submit_some(world)
        world.run_for(world.rng.random() * 0.02)
        world.kill("d1")
        world.start("d9", Role.DECODE)
        world.stop("p1")
        world.run_until(lambda: "p1" not in world.nodes)
        world.run_until(world.is_ready, LEASE_S)
        assert all(router.nodes == {"p0", "d0", "d9"} for router in world.routers)
        submit_some(world)
        world.settle()
        assert all(client.error is None for client in world.clients.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_restarted_at_once_at_its_address_is_found_again(seed: int) -> None:
    with ManyRouters(seed, prefill=1, decode=2) as world:
        submit_some(world)
        world.run_for(world.rng.random() * 0.05)
        world.restart("d0")
        world.run_until(
            lambda: all(world.nodes["d0"].peer in [n.peer for n in r.machine.node_table] for r in world.routers)
        )
        world.settle()
        assert all(client.error is None for client in world.clients.values())


@pytest.mark.fault("F30")
@pytest.mark.parametrize("seed", SEEDS)
def test_registry_lost_and_back_under_load(seed: int) -> None:
    """Serving goes on with the nodes that are known; a node that came meanwhile is found afterwards."""
    with ManyRouters(seed, prefill=2, decode=2) as world:
        submit_some(world)
        world.lose_registry()
        world.run_for(LEASE_S + 3 * POLL_S)
        assert all(router.nodes == {"p0", "p1", "d0", "d1"} for router in world.routers)
        assert all(router.machine.followed.problem for router in world.routers)
        world.start("d9", Role.DECODE)
        submit_some(world)
        world.run_for(2.0)
        assert not any("d9" in router.nodes for router in world.routers)
        world.registry_is_up = True
        world.run_until(world.is_ready, LEASE_S)
        submit_some(world)
        world.settle()
        assert not any(router.machine.followed.problem for router in world.routers)
        assert all(client.error is None for client in world.clients.values())


@pytest.mark.fault("F30")
@pytest.mark.parametrize("how", ["restarts", "stands still"])
@pytest.mark.parametrize("name", ["p0", "d0"])
def test_a_known_node_is_back_although_the_registry_is_lost(name: str, how: str) -> None:
    """Routers call the nodes that the registry last had, until it says otherwise."""
    with ManyRouters(prefill=2, decode=2) as world:
        submit_some(world)
        world.lose_registry()
        world.run_for(3 * POLL_S)
        if how == "restarts":
            world.restart(name)
        else:
            world.nodes[name].pause()
            world.run_until(lambda: not any(name in router.nodes for router in world.routers))
            world.nodes[name].resume()
        world.run_until(lambda: not world.registry_is_up and all(name in router.nodes for router in world.routers))
        peer = world.nodes[name].peer
        world.run_until(lambda: all(router.machine.node_table.get(peer) for router in world.routers), 10.0)
        submit_some(world)
        world.registry_is_up = True
        world.settle()
        assert all(client.error is None for client in world.clients.values())


def test_a_router_that_comes_while_a_node_drains_gives_it_nothing() -> None:
    with ManyRouters(prefill=1, decode=2, engine={"decode_token_s": 0.02}) as world:
        client = world.submit_to(0, 9, 100)
        world.run_until(lambda: len(client.token_ids) > 1)
        busy = next(name for name in ("d0", "d1") if world.nodes[name].machine.load().num_running)
        world.nodes[busy].handle(StopRequested())
        late = world.start_router()
        world.routers.append(late)
        world.run_until(lambda: busy in late.nodes)
        world.run_for(0.1)
        assert all(node.leaving == (node.node_id == busy) for node in late.machine.node_table)
        world.run_until(lambda: busy not in world.nodes)
        assert client.error is None


def test_a_node_answers_a_router_once_for_each_time_it_is_found() -> None:
    with ManyRouters(prefill=0, decode=0, mixed=1) as world:
        sent = world.link.sent[Register.__name__]
        world.run_for(30.0)
        assert world.link.sent[Register.__name__] == sent
