"""One message of a type is lost, whichever type it is: requests end, and nothing is held afterwards."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from support.world import World
from test_resuming import STORE

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.codec import MESSAGES
from kvrelay.protocol.ids import NodeId
from kvrelay.protocol.messages import engine, store_to_store
from router.events import DrainRequested, DumpRequested

CHOOSES_PLANS_IN_FLIGHT = True

OTHER_CHANNELS = {
    **dict.fromkeys(vars(engine), "a call within the process"),
    **dict.fromkeys(vars(store_to_store), "stores have a deadline for each call: tests/storage/test_owner_store.py"),
    "ProtocolViolation": "sent by the transport, not by a machine: tests/unit/runtime/test_transport.py",
}
"""Messages that no simulated network carries, and why."""

ON_THE_NETWORK = sorted(set(MESSAGES) - OTHER_CHANNELS.keys())

REQUEST_TIMEOUT_S = 40.0
SETTLES_S = 60.0


def eventful_life(world: World) -> None:
    """Let everything happen that makes processes talk: see the calls."""
    world.run_for(1.5)  # nodes have told of their room
    serve_some(world)
    fail_and_damage(world)
    crowd(world)
    let_a_lease_run_out(world)
    silence_a_node(world)
    kill_and_start_again(world)
    reset_the_prefix_caches(world)
    ask_for_recordings(world)
    drain_and_start_again(world)
    add_an_odd_node(world)
    serve_some(world)


def serve_some(world: World) -> None:
    """Requests of all kinds, of which some are aborted at several moments."""
    shared = world.prompt(12)
    for number in range(8):
        prompt = shared + world.prompt(world.rng.randrange(1, 30)) if number % 2 else world.prompt(20)
        scored = 1 if number == 4 else None
        client = world.submit(prompt, 12, num_prompt_logprobs=scored)
        if number % 3 == 2:
            world.run_until_sent("BlocksReserved" if number == 2 else "KVFrame")
            world.abort(client)
    world.run_for(1.0)


def fail_and_damage(world: World) -> None:
    """Steps that fail on P, and frames that are damaged."""
    world.nodes["p0"].failing_steps = set(range(1000))
    for _ in range(4):
        world.submit(20, 8)
    world.run_for(0.05)
    world.nodes["p0"].failing_steps = set()
    world.run_for(2.0)
    damaged = [world.link.corrupt("KVFrame", nth) for nth in (1, 6)]
    for _ in range(8):
        world.submit(20, 8)
    world.run_for(2.0)
    for fault in damaged:
        world.link.faults.remove(fault)


def crowd(world: World) -> None:
    """More than fits: refused reservations, another decode node, preemption, moves."""
    for _ in range(14):
        world.submit(36, 24)
    world.run_for(5.0)


def let_a_lease_run_out(world: World) -> None:
    """P says nothing of its reservations for longer than the lease, while their KV is on its way."""
    faults = [world.link.drop("RenewReservations"), world.link.delay("KVFrame", 3.0)]
    for _ in range(4):
        world.submit(40, 4)
    world.run_for(4.0)
    for fault in faults:
        world.link.faults.remove(fault)


def silence_a_node(world: World) -> None:
    """The router takes nodes for lost, and is asked by them to be registered again. One has requests by then."""
    nodes = [world.nodes["d1"], world.nodes["p1"]]
    for _ in range(8):
        world.submit(40, 4)
    world.run_for(0.01)
    for node in nodes:
        node.pause()
    world.run_for(7.0)
    for node in nodes:
        node.resume()
    world.run_for(2.0)


def kill_and_start_again(world: World) -> None:
    """A prefill node is replaced."""
    world.restart("p1")
    world.run_for(3.0)
    for _ in range(6):
        world.submit(20, 8)
    world.run_for(1.0)


def reset_the_prefix_caches(world: World) -> None:
    """An operator resets the prefix caches under load."""
    for _ in range(6):
        world.submit(20, 12)
    world.run_for(0.01)
    assert {node.state for node in world.reset_prefix_caches().nodes} == {"reset"}
    world.run_for(1.0)


def ask_for_recordings(world: World) -> None:
    """An operator wants the recordings of a node and its messager."""
    world.router.handle(DumpRequested(NodeId("p0"), "0a1b", with_prompts=False))
    world.run_for(0.5)


def drain_and_start_again(world: World) -> None:
    """An operator drains a node under load; its supervisor starts it again."""
    for _ in range(6):
        world.submit(20, 12)
    world.run_for(0.01)
    node = world.nodes["d0"]
    world.router.handle(DrainRequested(NodeId("d0")))
    world.run_for(25.0)
    if node.exit_reason is not None:
        world.start("d0", Role.DECODE)
    world.run_for(3.0)


def add_an_odd_node(world: World) -> None:
    """The router refuses a node of another geometry."""
    node = world.start("x0", Role.MIXED)
    world.run_until(lambda: node.exit_reason, 10.0)


def cluster(seed: int = 16) -> World:
    return World(
        seed,
        prefill=2,
        decode=2,
        mixed=1,
        cache={"num_blocks": 24},
        scheduler={"reserve_policy": "none", "watermark": 0.0, "max_num_batched_tokens": 32},
        transfer={"lease_s": 2.5, "link": "tcp"},
        storage=STORE,
        router={"prefill_routing": "cache_aware", "decode_routing": "cache_aware"},
        nodes={
            "d0": {"cache": {"num_blocks": 16}},
            "d1": {"cache": {"num_blocks": 16}},
            "x0": {"engine": {"head_dim": 16}},
        },
        limits={"request_timeout_s": REQUEST_TIMEOUT_S, "max_attempts": 5},
        engine={"eos_every": 0},
        careful=True,
    )


@pytest.fixture(scope="module")
def sent() -> Counter[str]:
    """How many messages of each type an eventful life has."""
    with cluster() as world:
        before = world.link.sent.copy()
        eventful_life(world)
        world.settle(SETTLES_S)
        return world.link.sent - before


def test_an_eventful_life_has_messages_of_every_type(sent: Counter[str]) -> None:
    assert [name for name in ON_THE_NETWORK if not sent[name]] == []
    assert not OTHER_CHANNELS.keys() & sent.keys()


@pytest.mark.fault("F16")
@pytest.mark.parametrize("message", ON_THE_NETWORK)
def test_one_message_of_a_type_is_lost(message: str, sent: Counter[str]) -> None:
    """Each request ends with its tokens or one error in time, all blocks come back, and the cluster serves."""
    for nth in {1, random.Random(message).randint(1, sent[message])}:
        with cluster() as world:
            fault = world.link.drop(message, nth)
            eventful_life(world)
            world.settle(SETTLES_S)
            assert fault.num_seen >= nth
            world.run_until(world.is_ready, 10.0)
            later = [world.submit(20, 8) for _ in range(6)]
            world.settle(SETTLES_S)
            assert [client.error for client in later] == [None] * 6
