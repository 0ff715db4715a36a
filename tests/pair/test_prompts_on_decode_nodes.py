"""Decode nodes compute prompts when prefill nodes are behind: the same tokens, whatever fails, and nothing is left."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.many_routers import ManyRouters
from support.world import Client, World

from decode_node.machine import DecodeMachine
from decode_node.request import DecodeStatus
from kvrelay.protocol.ids import NodeId
from kvrelay.protocol.request import FinishReason

SEEDS = range(6)
SHAPES = [{"prefill": 1, "decode": 1}, {"prefill": 1, "decode": 2}]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "num_logprobs": 2, "ignore_eos": True}
LENGTHS = (5, 17, 40, 30, 33, 8)


def lending(seed: int = 7, *, decode: int = 1, **options: Any) -> World:
    """Return a cluster whose decode nodes compute prompts in small chunks, and have said that they have room."""
    small = {"scheduler": {"max_num_batched_tokens": 16}}
    world = World(
        seed,
        decode=decode,
        router={"local_prefill_tokens": 16, **options.pop("router", {})},
        nodes={f"d{number}": {**small, **options.pop(f"d{number}", {})} for number in range(decode)},
        engine={"eos_every": 0, **options.pop("engine", {})},
        careful=True,
        **options,
    )
    world.run_until(lambda: all(node.num_heartbeats for node in world.router.machine.node_table))
    return world


def burst(world: World, *lengths: int, max_tokens: int = 12, **sampling: Any) -> list[Client]:
    """Submit prompts of these lengths at once; some must go to decode nodes, and some to others."""
    clients = [world.submit(length, max_tokens, **sampling) for length in lengths or LENGTHS]
    assert 0 < len(on_decode_nodes(clients)) < len(clients)
    return clients


def on_decode_nodes(clients: list[Client]) -> list[Client]:
    """Return those whose first attempt was given to a decode node, prompt and all."""
    return [client for client in clients if len(client.nodes) == 1 and client.nodes[0].startswith("d")]


def machine(world: World, name: str) -> DecodeMachine:
    found = world.nodes[name].machine
    assert isinstance(found, DecodeMachine)
    return found


def computing(world: World, name: str) -> bool:
    """Tell whether a decode node is in the middle of a prompt."""
    return any(
        request.status is DecodeStatus.RUNNING_PREFILL and request.num_computed_tokens > 0
        for request in machine(world, name).requests
    )


def assert_all_served(world: World) -> None:
    world.settle(60.0)
    assert [client.finish_reason for client in world.clients.values()] == [FinishReason.LENGTH] * len(world.clients)


# ---------------------------------------------------------------- nothing fails


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bursts_give_the_tokens_of_a_cluster_whose_decode_nodes_only_decode(shape: dict[str, int], seed: int) -> None:
    told = []
    for lent in (16, None):
        with lending(seed, **shape, router={"local_prefill_tokens": lent}) as world:
            clients = []
            for length in (9, 40, 33, 21, 64, 12, 50, 3) * 2:
                clients.append(world.submit(length, 10, **(SAMPLED if length % 2 else {})))
                if length == 12:
                    world.run_for(0.01)
            assert_all_served(world)
            told.append([(client.prompt, client.token_ids, client.logprobs) for client in clients])
            num_lent = len(on_decode_nodes(clients))
            counters = world.router.machine.requests.counters
            assert (counters.local_prefills, counters.retries) == (num_lent, 0)
            num_tokens = sum(len(client.prompt) for client in on_decode_nodes(clients))
            assert world.counted("prefill_tokens", "d") == num_tokens
            assert 0 < num_lent < len(clients) if lent else num_lent == 0
    assert told[0] == told[1]


def test_only_kv_of_prompts_computed_on_prefill_nodes_moves() -> None:
    with lending(cache={"prefix_caching": False}) as world:
        clients = burst(world)
        assert_all_served(world)
        geometry = world.nodes["p0"].engine.geometry
        sent = [client for client in clients if client not in on_decode_nodes(clients)]
        num_bytes = sum(geometry.blocks_for(len(client.prompt)) * geometry.block_bytes for client in sent)
        assert world.counted("kv_bytes_received", "d") == num_bytes


def test_the_next_turn_of_a_chat_finds_what_the_decode_node_has() -> None:
    with lending(router={"local_prefill_tokens": 0}) as world:
        first = world.submit(40, 9)
        assert first.nodes == ["d0"]
        world.settle()
        second = world.submit([*first.prompt, *first.token_ids, *world.prompt(10)], 5)
        assert second.nodes == ["d0"]
        assert_all_served(world)
        assert second.num_cached_tokens == 48
        assert world.counted("prefill_tokens", "d") == 40 + 59 - 48


def test_one_token_and_a_stop_token_from_the_decode_node() -> None:
    with lending(router={"local_prefill_tokens": 0}) as world:
        one = world.submit(30, 1)
        reference = world.greedy_reference(prompt := world.prompt(20))
        world.settle()
        stopped = world.submit(prompt, 20, stop_token_ids=[reference[3]], ignore_eos=True)
        world.settle()
        assert one.nodes == stopped.nodes == ["d0"]
        assert (one.finish_reason, stopped.finish_reason) == (FinishReason.LENGTH, FinishReason.STOP)
        assert stopped.stop_token_id == reference[3]


def test_decode_nodes_serve_without_any_prefill_node() -> None:
    with World(prefill=0, decode=2, router={"local_prefill_tokens": 1000}, careful=True) as world:
        assert world.router.machine.unready_reason() is None
        clients = [world.submit(length, 12) for length in LENGTHS]
        world.settle()
        assert {tuple(client.nodes) for client in clients} == {("d0",), ("d1",)}
        assert {client.error for client in clients} == {None}


def test_prompts_that_wait_behind_others_do_not_keep_the_next_away() -> None:
    """D is told of one prompt after the other, and says in its heartbeats that some wait."""
    with lending(engine={"prefill_token_s": 0.02}, cache={"num_blocks": 512}) as world:
        clients, num_waiting = [], []
        for _ in range(30):
            clients.append(world.submit(40, 4))
            world.run_for(0.3)
            node = world.router.machine.node_table.named(NodeId("d0"))
            assert node is not None
            num_waiting.append(node.load.num_waiting)
        lent = [client in on_decode_nodes(clients) for client in clients]
        assert all(num_waiting[20:])
        assert sum(lent[20:]) in (4, 5, 6)
        assert_all_served(world)


def test_preempted_on_the_decode_node_that_computed_them() -> None:
    with lending(
        decode=2,
        cache={"num_blocks": 160},
        d0={"cache": {"num_blocks": 32}},
        d1={"cache": {"num_blocks": 32}},
        scheduler={"reserve_policy": "none", "watermark": 0.0},
        storage={"backend": "file", "min_read_tokens": 1, "resume": "storage"},
    ) as world:
        burst(world, *[24] * 10, max_tokens=50, **SAMPLED)
        assert_all_served(world)
        assert world.counted("preemptions", "d") > 0


def test_a_decode_node_tells_of_preempted_requests_and_not_of_prompts_that_wait() -> None:
    with lending(cache={"num_blocks": 16}, scheduler={"reserve_policy": "none", "watermark": 0.0}) as world:
        for _ in range(2):
            world.submit(20, 36, ignore_eos=True)
        world.run_until(lambda: world.counted("preemptions", "d"))
        load = machine(world, "d0").load()
        assert (load.num_waiting, load.num_preempted) == (1, 1)
        world.settle()
        assert machine(world, "d0").load().num_preempted == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_several_routers_lend_the_same_decode_nodes(seed: int) -> None:
    options: dict[str, Any] = {"router": {"local_prefill_tokens": 8}, "cache": {"num_blocks": 48}}
    with ManyRouters(seed, routers=2, prefill=1, decode=2, **options) as world:
        world.run_for(1.5)
        for number in range(16):
            world.submit_to(number % 2, world.rng.randrange(3, 40), 20)
            if number == 8:
                world.run_for(1.0)
        world.settle()
        assert all(client.error is None for client in world.clients.values())
        assert all(router.machine.requests.counters.local_prefills > 0 for router in world.routers)


# ---------------------------------------------------------------- the network fails


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lost_prompt_ends_at_its_deadline(shape: dict[str, int]) -> None:
    with lending(**shape, limits={"request_timeout_s": 60.0}) as world:
        world.link.drop("Generate", 1)
        clients = burst(world)
        world.settle(61.0)
        errors = [client.error for client in clients]
        assert (errors.count("transfer_timeout"), errors.count(None)) == (1, len(clients) - 1)
        assert on_decode_nodes(clients)[0].error == "transfer_timeout"


@pytest.mark.parametrize("seconds", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("message", ["Generate", "TokensOut", "Prefill", "HandOff", "Heartbeat", "RequestTimeline"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_message_comes_twice(shape: dict[str, int], message: str, seconds: float) -> None:
    with lending(**shape) as world:
        world.link.duplicate(message, seconds)
        burst(world)
        assert_all_served(world)
        world.run_for(5.0)
        burst(world)
        assert_all_served(world)


@pytest.mark.parametrize("message", ["Generate", "TokensOut", "Heartbeat", "Prefill"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_message_is_overtaken(shape: dict[str, int], message: str) -> None:
    for seconds in (0.001, 0.02):
        for nth in (1, 2, 3):
            with lending(**shape) as world:
                world.link.overtake(message, seconds, nth)
                burst(world)
                assert_all_served(world)


def test_the_word_that_a_prompt_has_failed_is_lost() -> None:
    with lending(limits={"request_timeout_s": 60.0}) as world:
        world.link.drop("RequestFailed", 1)
        world.nodes["d0"].failing_steps = {1}
        clients = burst(world)
        world.settle(61.0)
        assert on_decode_nodes(clients)[0].error == "transfer_timeout"


# ---------------------------------------------------------------- somebody ends


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decode_node_dies_while_it_computes_a_prompt(shape: dict[str, int], seed: int) -> None:
    with lending(seed, **shape, limits={"request_timeout_s": 100.0, "max_attempts": 5}) as world:
        burst(world)
        world.run_until(lambda: computing(world, "d0"))
        world.restart("d0")
        assert_all_served(world)
        assert world.router.machine.requests.counters.retries > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_only_prefill_node_dies_for_good(shape: dict[str, int], seed: int) -> None:
    """At a random moment. What it had goes to the decode nodes when it is known to be dead, and so does all else."""
    with lending(seed, **shape, limits={"max_attempts": 5}) as world:
        first = burst(world)
        world.run_for(world.rng.random() * 0.02)
        world.kill("p0")
        world.run_until(lambda: len(list(world.router.machine.node_table)) == len(world.nodes), 20.0)
        assert world.router.machine.unready_reason() is None
        later = [world.submit(length, 12) for length in LENGTHS]
        assert len(on_decode_nodes(later)) == len(later)
        assert_all_served(world)
        assert len(on_decode_nodes(first)) < len(first)


def test_a_step_with_a_prompt_fails_on_the_decode_node() -> None:
    with lending() as world:
        world.nodes["d0"].failing_steps = {1}
        clients = burst(world)
        world.settle(5.0)
        assert on_decode_nodes(clients)
        assert world.router.machine.requests.counters.retries == 1
        assert not any(client.error for client in clients)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_client_leaves_whose_prompt_a_decode_node_computes(seed: int) -> None:
    """Before it has begun, in the midst of it, or while it decodes; nobody waits for a lease."""
    with lending(seed) as world:
        clients = burst(world)
        leaving = on_decode_nodes(clients)
        world.run_for(world.rng.random() * 0.03)
        for client in leaving:
            if client.ended is None:
                world.abort(client)
        world.settle(1.0)
        assert {client.finish_reason for client in clients if client not in leaving} == {FinishReason.LENGTH}


def test_a_decode_node_that_drains_finishes_the_prompts_it_has() -> None:
    with lending(decode=2) as world:
        burst(world)
        world.run_until(lambda: computing(world, "d0"))
        world.stop("d0")
        world.run_until(lambda: "d0" not in world.nodes)
        assert_all_served(world)
        assert world.router.machine.requests.counters.nodes_lost == 0


@pytest.mark.parametrize("seed", range(30))
def test_faults_and_deaths_at_random(seed: int) -> None:
    rng = random.Random(seed)
    limits = {"request_timeout_s": 100.0, "max_attempts": 10}
    shape = {"prefill": rng.randint(1, 2), "decode": rng.randint(1, 2)}
    lent: dict[str, Any] = {"local_prefill_tokens": 0}
    with lending(seed, **shape, limits=limits, router=lent, cache={"num_blocks": rng.randint(24, 64)}) as world:
        world.link.disturb(drop=0.003, duplicate=0.02, overtake=0.02, delay=0.02)
        for _ in range(3):
            for _ in range(rng.randint(2, 6)):
                world.submit(rng.randint(1, 60), rng.randint(1, 20), **(SAMPLED if rng.random() < 0.5 else {}))
            world.run_for(rng.random() * 0.03)
            if rng.random() < 0.6:
                world.restart(rng.choice(sorted(world.nodes)))
            world.run_for(rng.choice([0.0, 1.5]))
        world.settle_clients(150.0)
        world.link.heal()
        world.settle(60.0)
        assert world.router.machine.requests.counters.local_prefills > 0
