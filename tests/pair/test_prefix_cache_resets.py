"""Prefix caches that are reset under load: no later prompt finds what was there, and requests in progress go on."""

from __future__ import annotations

from typing import Any

import pytest
from support.world import World
from test_kv_events import EVENTS, check_events

from router.events import CacheResetRequested

CACHE = {"block_size": 4, "num_blocks": 200}
AWARE = {"prefill_routing": "cache_aware", "decode_routing": "cache_aware"}


def matched(world: World, prompt: list[int]) -> dict[str, int]:
    """Return how many of the prompt's blocks each node has published."""
    machines = {name: node.machine for name, node in world.nodes.items()}
    return {name: len(machine.kv.match(machine._hasher.hashes(prompt))) for name, machine in machines.items()}


@pytest.mark.parametrize("shape", ["disaggregated", "mixed"])
def test_a_prompt_is_computed_anew_after_a_reset(shape: str) -> None:
    sizes: dict[str, Any] = {} if shape == "disaggregated" else {"prefill": 0, "decode": 0, "mixed": 1}
    with World(1, cache=CACHE, router=AWARE, **sizes) as world:
        prompt = world.prompt(40)
        for _ in range(2):
            client = world.submit(prompt, 4)
            world.settle()
        assert client.num_cached_tokens > 0
        ended = world.reset_prefix_caches()
        assert {node.state for node in ended.nodes} == {"reset"}
        assert all(node.num_blocks >= 10 for node in ended.nodes)
        assert set(matched(world, prompt).values()) == {0}
        assert not any(node.prefixes.reported for node in world.router.machine.node_table)
        client = world.submit(prompt, 4)
        world.settle()
        assert client.num_cached_tokens == 0
        client = world.submit(prompt, 4)
        world.settle()
        assert client.num_cached_tokens > 0


def test_kv_of_requests_in_progress_is_not_found_later() -> None:
    """Neither what was published of them at the reset, nor what would have been after it."""
    with World(2, cache=CACHE, scheduler={"max_num_batched_tokens": 16}) as world:
        prompts = [world.prompt(60) for _ in range(4)]
        clients = [world.submit(prompt, 30, ignore_eos=True) for prompt in prompts]
        world.run_until(lambda: len(clients[0].token_ids) > 3 and not clients[3].token_ids)
        world.reset_prefix_caches()
        world.settle()
        assert matched(world, prompts[0]) == {"p0": 0, "d0": 0}
        assert all(client.error is None and len(client.token_ids) == 30 for client in clients)


def test_kv_that_comes_to_a_decode_node_after_the_reset_is_not_found_later() -> None:
    """It is from before the reset, and from a prefix cache that has been emptied."""
    with World(3, cache={**CACHE, "num_blocks": 64}, nodes={"d0": {"cache": {"num_blocks": 24}}}) as world:
        prompt = world.prompt(40)
        world.submit(prompt, 2)
        world.settle()
        running = world.submit(world.prompt(60), 30, ignore_eos=True)
        world.run_until(lambda: len(running.token_ids) > 2)
        late = world.submit(prompt + world.prompt(8), 10, ignore_eos=True)
        world.run_until_arrived("ReservationRefused")
        world.reset_prefix_caches()
        world.settle()
        assert late.num_cached_tokens == 40
        assert matched(world, late.prompt) == {"p0": 0, "d0": 0}
        world.submit(late.prompt, 2)
        world.settle()
        assert matched(world, late.prompt) == {"p0": 12, "d0": 12}


@pytest.mark.parametrize("message", ["ReserveBlocks", "BlocksReserved", "HandOff", "ResetPrefixCache"])
@pytest.mark.parametrize("seconds", [0.001, 0.3])
def test_a_message_that_is_late_lets_no_kv_survive(message: str, seconds: float) -> None:
    """Nodes are reset over other connections than those over which prompts come and go."""
    with World(4, cache=CACHE, scheduler={"max_num_batched_tokens": 16}) as world:
        prompts = [world.prompt(40) for _ in range(3)]
        for prompt in prompts:
            world.submit(prompt, 2)
        world.settle()
        world.link.delay(message, seconds)
        prompts = [prompt + world.prompt(8) for prompt in prompts]
        for prompt in prompts:
            world.submit(prompt, 10, ignore_eos=True)
            world.run_for(0.001)
        assert {node.state for node in world.reset_prefix_caches().nodes} == {"reset"}
        world.link.heal()
        world.settle()
        assert not any(any(matched(world, prompt).values()) for prompt in prompts)


@pytest.mark.parametrize("seed", range(20))
def test_no_kv_survives_whatever_is_lost_or_late(seed: int) -> None:
    with World(seed, prefill=2, decode=2, cache={**CACHE, "num_blocks": 40}) as world:
        prompts = [world.prompt(40) for _ in range(4)]
        for _ in range(8):
            world.submit(world.rng.choice(prompts) + world.prompt(4), 8, ignore_eos=True)
            world.run_until_arrived("Prefill")
            world.link.disturb(drop=0.005, duplicate=0.03, overtake=0.05, delay=0.2)
        num_waiting = sum(world.nodes[name].machine.load().num_waiting for name in ("p0", "p1"))
        num_begun = world.link.arrived["Prefill"] + world.link.arrived["Generate"]
        ended = world.reset_prefix_caches()
        world.settle_clients()
        world.link.heal()
        world.settle()
        was_begun_later = world.link.arrived["Prefill"] + world.link.arrived["Generate"] > num_begun
        if num_waiting or was_begun_later or world.counted("preemptions", "d"):
            return  # prompts were computed after the reset
        if {node.state for node in ended.nodes} == {"reset"}:
            assert not any(any(matched(world, prompt).values()) for prompt in prompts)


@pytest.mark.parametrize("seed", range(5))
def test_every_reset_ends_once_whatever_restarts_or_drains(seed: int) -> None:
    with World(seed, prefill=2, decode=2, mixed=1, cache={**CACHE, "num_blocks": 40}) as world:
        world.link.disturb(drop=0.003, duplicate=0.05, overtake=0.05, delay=0.2)
        prompts = [world.prompt(40) for _ in range(3)]
        for step in range(25):
            world.submit(world.rng.choice(prompts) + world.prompt(4), 12, ignore_eos=True)
            world.run_for(world.rng.choice([0.0, 0.002, 0.02, 0.3]))
            if step % 4 == 0:
                world.router.handle(CacheResetRequested(step))
            elif step % 7 == 0:
                world.restart(world.rng.choice(list(world.nodes)))
            elif step == 15:
                world.stop(world.rng.choice(list(world.nodes)))
        world.settle_clients()
        world.link.heal()
        world.settle()
        assert sorted(ended.reset for ended in world.cache_resets) == list(range(0, 25, 4))
        world.reset_prefix_caches()
        assert not any(any(matched(world, prompt).values()) for prompt in prompts)


@pytest.mark.parametrize("seed", range(4))
def test_subscribers_are_told_that_all_blocks_are_gone(seed: int) -> None:
    with World(seed, cache={"num_blocks": 24}, nodes=dict.fromkeys(("p0", "d0"), EVENTS)) as world:
        chats = [world.prompt(world.rng.randint(20, 30)) for _ in range(4)]
        for _ in range(12):
            world.submit(list(world.rng.choice(chats)), 6)
            world.run_for(world.rng.random() * 0.05)
            if world.rng.random() < 0.3:
                world.reset_prefix_caches()
        world.settle()
        world.reset_prefix_caches()
        subscribers = check_events(world)
        for name, node in world.nodes.items():
            assert not subscribers[name].blocks
            assert [type(event).__name__ for event in node.kv_events[-1].events] == ["AllBlocksCleared"]
