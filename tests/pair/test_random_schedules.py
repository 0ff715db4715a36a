"""Clusters of every shape under random load: every request ends, with the right tokens, and no block is ever lost.

``--schedules N --first-seed S`` runs N of each kind from seed S on, instead of a few; see ``scripts/fuzz-schedules``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.world import Client, World

FEW = 40
CHOOSES_PLANS_IN_FLIGHT = True


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> Iterator[int]:
    first, count = request.config.getoption("first_seed"), request.config.getoption("schedules") or FEW
    return iter(range(first, first + count))


def some_cluster(rng: random.Random, seed: int, **options: Any) -> World:
    """Return a World of 12 to 64 blocks a node, whose every setting is drawn."""
    shape = rng.choice(["disaggregated", "mixed", "both"])
    return World(
        seed,
        prefill=0 if shape == "mixed" else rng.randint(1, 2),
        decode=0 if shape == "mixed" else rng.randint(1, 3),
        mixed=0 if shape == "disaggregated" else rng.randint(1, 2),
        cache={
            "block_size": rng.choice([1, 2, 4]),
            "num_blocks": rng.randint(12, 64),
            "prefix_caching": rng.random() < 0.8,
            "output_caching": rng.random() < 0.7,
        },
        scheduler={
            "max_num_batched_tokens": rng.choice([3, 8, 32, 64]),
            "max_num_seqs": rng.choice([2, 4, 16]),
            "prefill_policy": rng.choice(["dedicated", "shared"]),
            "prefill_order": rng.choice(["fifo", "shortest_first", "shortest_first"]),
            "prefill_overtake_tokens": rng.choice([0, 20, 60, 16384]),
            "reserve_policy": rng.choice(["new_token_ratio", "fixed_blocks", "sglang", "none"]),
            "watermark": rng.choice([0.0, 0.01, 0.2]),
            "preemption_order": rng.choice(["latest_first", "shortest_output_first"]),
            "requeue": rng.choice(["front", "tail"]),
            "enable_priority_scheduling": rng.random() < 0.5,
            "priority_aging_s": rng.choice([0.01, 0.1, 10.0]),
        },
        transfer={"link": rng.choice(["auto", "tcp"]), "layerwise": rng.random() < 0.8},
        engine={
            "num_layers": rng.randint(1, 3),
            "max_plans_in_flight": rng.choice([1, 2]),
            **options.pop("engine", {}),
        },
        storage=rng.choice([{}, some_storage(rng)]),
        speculative={"method": rng.choice(["none", "none", "naive", "ngram"]), "num_speculative_tokens": 3},
        layers_at_once=rng.randint(1, 3),
        careful=True,
        **options,
    )


def some_storage(rng: random.Random) -> dict[str, Any]:
    """Return the section of a store that all nodes share."""
    return {
        "backend": "file",
        "write_policy": rng.choice(["on_finish", "on_preempt", "off"]),
        "resume": rng.choice(["storage", "recompute", "auto"]),
        "min_read_tokens": rng.choice([1, 8]),
        "staging": 1 << rng.randint(16, 20),
        "timeout_s": rng.choice([0.002, 2.0]),
        "read_timeout_s": rng.choice([0.002, 0.5]),
    }


def capacity(world: World) -> int:
    """Tokens a whole pool holds."""
    cache = next(iter(world.nodes.values())).config.cache
    return cache.fixed_num_blocks * cache.block_size


def some_prompt(rng: random.Random, world: World, common: list[int], longest: int) -> list[int]:
    """Return a prompt that often begins like others, and is sometimes nothing else."""
    prompt = world.prompt(rng.randint(1, max(1, longest - len(common))))
    return rng.choice([prompt, common + prompt, common + prompt, list(common)])[:longest]


def abort_later(world: World, client: Client, seconds: float) -> None:
    def abort() -> None:
        if client.ended is None:
            world.abort(client)

    world.after(seconds, abort)


def cancel_later(world: World, client: Client, seconds: float) -> None:
    def cancel() -> None:
        if client.ended is None:
            world.cancel(client)

    world.after(seconds, cancel)


def num_unexpected(world: World) -> float:
    """Return how many messages came to a machine that does not take them."""
    messagers = [node.messager.machine for node in world.nodes.values() if node.messager is not None]
    by_messagers = sum(messager.counters["messager_unexpected_messages"] for messager in messagers)
    by_nodes = sum(world.counted("unexpected_messages", letter) for letter in "pdm")
    return world.router.machine.counters["unexpected_messages"] + by_messagers + by_nodes


def check_all(seeds: Iterator[int], check: Callable[[random.Random, int], None]) -> None:
    for seed in seeds:
        try:
            check(random.Random(seed), seed)
        except Exception as error:
            test = check.__qualname__.partition(".")[0]
            repeat = f"tests/pair/test_random_schedules.py::{test} --schedules 1 --first-seed {seed}"
            error.add_note(f"to repeat: scripts/test {repeat}")
            raise


def test_random_arrivals_lengths_priorities_and_departures(seeds: Iterator[int]) -> None:
    def check(rng: random.Random, seed: int) -> None:
        with some_cluster(rng, seed) as world:
            size = capacity(world)
            common = world.prompt(rng.randint(1, size // 3))
            for _ in range(rng.randint(1, 12)):
                prompt = some_prompt(rng, world, common, size - 2)
                client = world.submit(prompt, rng.randint(1, size - len(prompt)), priority=rng.randint(-1, 2))
                if rng.random() < 0.2:
                    abort_later(world, client, rng.random() * 0.1)
                if rng.random() < 0.5:
                    world.run_for(rng.random() * 0.05)
            world.settle(300.0)
            # Whoever fits a pool alone gets through, whatever else there is.
            assert {client.error for client in world.clients.values()} == {None}
            assert num_unexpected(world) == 0

    check_all(seeds, check)


@pytest.mark.fault("F11")
def test_long_outputs_in_small_pools(seeds: Iterator[int]) -> None:
    """Preemption all the time; requests that outgrow even the whole pool end with an error and all they generated."""

    def check(rng: random.Random, seed: int) -> None:
        with some_cluster(rng, seed, engine={"eos_every": 0}) as world:
            size = capacity(world)
            for _ in range(rng.randint(2, 8)):
                world.submit(world.prompt(rng.randint(1, max(1, size // 4))), rng.randint(1, 2 * size // 2 + 8))
                world.run_for(rng.random() * 0.03)
            world.settle(300.0)
            for client in world.clients.values():
                total = len(client.prompt) + client.sampling.max_tokens
                assert client.error in (None, "kv_cache_too_small")
                if client.error:
                    assert total > size
                    assert len(client.prompt) + len(client.token_ids) >= size

    check_all(seeds, check)


@pytest.mark.fault("F13", "F18")
def test_random_faults_and_restarts(seeds: Iterator[int]) -> None:
    def check(rng: random.Random, seed: int) -> None:
        limits = {"request_timeout_s": 100.0, "max_attempts": 10}
        with some_cluster(rng, seed, limits=limits) as world:
            world.link.disturb(drop=0.003, duplicate=0.01, overtake=0.01, delay=0.02, corrupt=0.003)
            size = capacity(world)
            common = world.prompt(rng.randint(1, size // 3))
            for _ in range(rng.randint(2, 10)):
                prompt = some_prompt(rng, world, common, size - 2)
                world.submit(prompt, rng.randint(1, size - len(prompt)), priority=rng.randint(-1, 2))
                world.run_for(rng.random() * 0.03)
                if rng.random() < 0.15:
                    world.restart(rng.choice(sorted(world.nodes)))
            world.settle_clients(150.0)
            world.link.heal()
            world.settle(60.0)

    check_all(seeds, check)


def test_random_faults_and_restarts_where_decode_nodes_compute_prompts_too(seeds: Iterator[int]) -> None:
    num_local_prefills = []

    def check(rng: random.Random, seed: int) -> None:
        limits = {"request_timeout_s": 100.0, "max_attempts": 10}
        with some_cluster(rng, seed, limits=limits, router={"local_prefill_tokens": rng.choice([0, 1, 20])}) as world:
            world.run_for(1.5)  # nodes have told of their room
            world.link.disturb(drop=0.003, duplicate=0.01, overtake=0.01, delay=0.02, corrupt=0.003)
            size = capacity(world)
            for _ in range(rng.randint(2, 12)):
                prompt = world.prompt(rng.randint(1, size - 2))
                client = world.submit(prompt, rng.randint(1, size - len(prompt)), priority=rng.randint(-1, 2))
                if rng.random() < 0.2:
                    abort_later(world, client, rng.random() * 0.1)
                world.run_for(rng.choice([0.0, 0.0, rng.random() * 0.03, 1.0]))
                if rng.random() < 0.15:
                    world.restart(rng.choice(sorted(world.nodes)))
            world.settle_clients(150.0)
            world.link.heal()
            world.settle(60.0)
            num_local_prefills.append(world.router.machine.requests.counters.local_prefills)

    check_all(seeds, check)
    assert sum(map(bool, num_local_prefills)) > len(num_local_prefills) // 3


def test_random_faults_while_operators_cancel_and_prompts_have_logprobs(seeds: Iterator[int]) -> None:
    def check(rng: random.Random, seed: int) -> None:
        limits = {"request_timeout_s": 100.0, "max_attempts": 10}
        router = {"local_prefill_tokens": rng.choice([None, 0, 20])}
        with some_cluster(rng, seed, limits=limits, router=router) as world:
            world.link.disturb(drop=0.003, duplicate=0.01, overtake=0.01, delay=0.02, corrupt=0.003)
            size = capacity(world)
            common = world.prompt(rng.randint(1, size // 3))
            for _ in range(rng.randint(2, 12)):
                prompt = some_prompt(rng, world, common, size - 2)
                alternatives = rng.choice([None, 0, 2])
                fewest = 1 if alternatives is None else 0
                client = world.submit(prompt, rng.randint(fewest, size - len(prompt)), num_prompt_logprobs=alternatives)
                if rng.random() < 0.3:
                    cancel_later(world, client, rng.random() * 0.1)
                world.run_for(rng.choice([0.0, rng.random() * 0.03, 1.0]))
                if rng.random() < 0.15:
                    world.restart(rng.choice(sorted(world.nodes)))
            world.settle_clients(150.0)
            world.link.heal()
            world.settle(60.0)

    check_all(seeds, check)
