"""KV events of nodes under load: a subscriber knows exactly the blocks that the node has published."""

from __future__ import annotations

from typing import Any

import pytest
from support.kv_subscriber import KVSubscriber
from support.world import World

from kvrelay.protocol.kv_events import event_hashes

EVENTS = {"kv_events": {"endpoint": "tcp://127.0.0.1:5557"}}


def check_events(world: World) -> dict[str, KVSubscriber]:
    """Compare what subscribers of all nodes know with the nodes' prefix caches."""
    subscribers = {}
    for name, process in world.nodes.items():
        subscriber = subscribers[name] = KVSubscriber(process.config.cache.block_size)
        for action in process.kv_events:
            subscriber.take_action(action)
        assert subscriber.blocks.keys() == set(event_hashes(process.machine.kv.published())), name
        subscriber.check_hashes(process.machine._hasher)
    return subscribers


@pytest.mark.parametrize("seed", range(10))
def test_subscribers_follow_a_random_load(seed: int) -> None:
    options: dict[str, Any] = {"cache": {"num_blocks": 24}, "scheduler": {"reserve_policy": "none", "watermark": 0.0}}
    with World(seed, decode=2, mixed=1, nodes=dict.fromkeys(("p0", "d0", "d1", "m0"), EVENTS), **options) as world:
        chats = [world.prompt(world.rng.randint(4, 30)) for _ in range(5)]
        for _ in range(30):
            chat = world.rng.choice(chats)
            client = world.submit(list(chat), world.rng.randint(1, 12))
            world.run_for(world.rng.random() * 0.05)
            if world.rng.random() < 0.5:
                world.run_until(lambda client=client: client.ended)  # type: ignore[misc]
                chat += client.token_ids + world.prompt(3)
                if len(chat) > 60:
                    chats[chats.index(chat)] = world.prompt(8)
        world.settle()
        subscribers = check_events(world)
        assert any(subscriber.num_events > 10 for subscriber in subscribers.values())


def test_a_node_that_restarts_begins_with_nothing() -> None:
    with World(nodes={"p0": EVENTS, "d0": EVENTS}) as world:
        world.submit(20)
        world.settle()
        assert check_events(world)["p0"].blocks
        world.restart("p0")
        world.run_for(1.0)
        (first,) = world.nodes["p0"].kv_events
        assert [type(event).__name__ for event in first.events] == ["AllBlocksCleared"]
        assert not check_events(world)["p0"].blocks


def test_an_emptied_cache_is_told_as_such() -> None:
    with World(nodes={"p0": EVENTS, "d0": EVENTS}) as world:
        world.submit(20)
        world.settle()
        process = world.nodes["p0"]
        process.machine.kv.clear()
        world.run_for(2.0)
        assert type(process.kv_events[-1].events[-1]).__name__ == "AllBlocksCleared"
        assert not check_events(world)["p0"].blocks


def test_nodes_without_subscribers_log_nothing() -> None:
    with World() as world:
        world.submit(20)
        world.settle()
        assert not any(process.kv_events for process in world.nodes.values())
        assert all(process.machine.kv._prefixes.events is None for process in world.nodes.values())
