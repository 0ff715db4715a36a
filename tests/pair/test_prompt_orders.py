"""The order in which prompts are computed changes when tokens come, and none of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.world import Client, World

ORDERS = ["fifo", "shortest_first"]
SMALL_STEPS = {"max_num_batched_tokens": 8}


def tokens_of(order: str, seed: int, **shape: Any) -> list[list[int]]:
    """Return the tokens of some requests that begin alike, and are more than the pools hold at once."""
    rng = random.Random(seed)
    scheduler = {**SMALL_STEPS, "prefill_order": order, "enable_priority_scheduling": seed % 2 == 1}
    with World(seed, cache={"num_blocks": 40, "block_size": 4}, scheduler=scheduler, **shape) as world:
        common = [rng.randrange(10, 60) for _ in range(20)]
        clients = []
        for _ in range(12):
            own = [rng.randrange(10, 60) for _ in range(rng.choice([1, 3, 10, 60]))]
            prompt = rng.choice([own, [*common, *own]])
            clients.append(
                world.submit(prompt, rng.randint(1, 12), priority=rng.randint(0, 1), temperature=1.0, seed=7)
            )
            world.run_for(rng.random() * 0.01)
        world.settle()
        assert [client.error for client in clients] == [None] * len(clients)
        return [client.token_ids for client in clients]


@pytest.mark.parametrize("shape", [{"prefill": 1, "decode": 2}, {"prefill": 0, "decode": 0, "mixed": 1}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_the_same_in_either_order(seed: int, shape: dict[str, int]) -> None:
    assert tokens_of("fifo", seed, **shape) == tokens_of("shortest_first", seed, **shape)


def first_tokens(world: World, clients: dict[str, Client]) -> list[str]:
    """Let all requests end; return their names in the order in which their first tokens came."""
    order: list[str] = []

    def all_ended() -> bool:
        order.extend(name for name, client in clients.items() if client.token_ids and name not in order)
        return world.all_ended()

    world.run_until(all_ended)
    return order


@pytest.mark.parametrize("shape", [{"prefill": 1}, {"prefill": 0, "decode": 0, "mixed": 1}], ids=str)
@pytest.mark.parametrize(
    ("order", "expected"), [("fifo", ["long", "next turn"]), ("shortest_first", ["next turn", "long"])]
)
def test_the_next_turn_of_a_chat_does_not_wait_for_a_long_prompt(
    shape: dict[str, Any], order: str, expected: list[str]
) -> None:
    engine = {"eos_every": 0, "prefill_token_s": 1e-3}
    with World(
        cache={"num_blocks": 200}, scheduler={**SMALL_STEPS, "prefill_order": order}, engine=engine, **shape
    ) as world:
        history = world.prompt(60)
        first = world.submit(history, 4)
        world.run_until(world.all_ended)
        clients = {"long": world.submit(100, 1)}
        world.run_for(0.002)
        clients["next turn"] = world.submit([*history, *first.token_ids, *world.prompt(4)], 1)
        assert first_tokens(world, clients) == expected
