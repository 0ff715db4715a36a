"""Anybody can reach a port. What strangers say, sensible or not, breaks nothing and nobody."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.machines import D0, MESSAGER, P0, ROUTER, NodeHarness
from support.messages import EXAMPLES, random_values
from support.processes import Process
from support.world import World

from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import Exit, Log, PeerLost, Received
from kvrelay.protocol.codec import MESSAGES
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.messages.node_to_messager import StopMessager
from kvrelay.protocol.messages.node_to_router import Leaving
from kvrelay.protocol.messages.router_to_node import Drain, RegistrationRefused

pytestmark = pytest.mark.fault("F28")

NODES = [Role.PREFILL, Role.DECODE, Role.MIXED]


class Silent:
    """A machine that says nothing."""

    def handle(self, event: object, now: float) -> list[object]:
        return []

    def assert_quiescent(self) -> None:
        return


@pytest.mark.parametrize("peer", ["x#1", P0, D0, MESSAGER, ROUTER])
@pytest.mark.parametrize("role", NODES)
def test_a_node_survives_every_message_from_everybody(role: Role, peer: str) -> None:
    for message in EXAMPLES:
        harness = NodeHarness(role)
        harness.receive(PeerId(peer), message)
        harness.receive(PeerId(peer), message)
        if peer == "x#1":
            assert harness.did(Exit) == []


@pytest.mark.parametrize("role", NODES)
@pytest.mark.parametrize(
    ("peer", "message"), [("x#1", Drain()), (MESSAGER, Leaving()), (ROUTER, Leaving()), ("x#1", StopMessager())]
)
def test_a_node_counts_what_it_does_not_take_and_logs_it_once(role: Role, peer: str, message: Message) -> None:
    harness = NodeHarness(role)
    for _ in range(3):
        harness.receive(PeerId(peer), message)
    [log] = harness.did(Log)
    assert (log.event, log.fields["peer"]) == ("unexpected message", peer)
    assert harness.machine.load().counters["unexpected_messages"] == 3.0


@pytest.mark.parametrize("role", NODES)
def test_a_node_survives_random_messages_of_strangers(role: Role) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(sorted(MESSAGES.values(), key=repr)).flatmap(random_values), max_size=8))
    def check(messages: list[Message]) -> None:
        harness = NodeHarness(role)
        for message in messages:
            harness.receive(PeerId("x#1"), message)
        harness.post(PeerLost(PeerId("x#1"), "gone"))
        harness.pass_time(100.0)
        if harness.plan is not None:
            harness.run_steps(100_000)

    check()


def strange(world: World, *addresses: str) -> Process:
    """Let a stranger come who reaches out to everybody."""
    stranger = Process(world, PeerId("x#1"), Silent(), ["tcp://x:1"])
    for number, address in enumerate(addresses):
        stranger.connections[PeerId(f"target {number}")] = address
    return stranger


@pytest.mark.parametrize("seed", range(6))
def test_a_cluster_under_load_does_its_work_while_strangers_talk(seed: int) -> None:
    with World(seed, prefill=2, decode=2, mixed=1, engine={"eos_every": 0}, careful=True) as world:
        addresses = [address for process in world.processes.values() for address in process.addresses]
        stranger = strange(world, *addresses)
        for _ in range(8):
            world.submit(world.rng.randrange(1, 40), 8)
            for _ in range(20):
                message: Any = world.rng.choice(EXAMPLES)
                if not isinstance(message, RegistrationRefused):
                    payload = (memoryview(b"x" * 64),) if world.rng.random() < 0.2 else ()
                    stranger.send(world.rng.choice(list(stranger.connections)), message, payload)
            world.run_for(0.005)
        world.run_until(world.all_ended, 30.0)
        stranger.exit("gone")
        world.settle(60.0)
        assert [client.error for client in world.clients.values()] == [None] * 8


def test_a_messager_answers_who_has_no_business_with_it() -> None:
    with World() as world:
        messager = world.nodes["d0"].messager
        assert messager is not None
        for message in EXAMPLES:
            messager.handle(Received(PeerId("x#1"), message, (memoryview(b"x" * 64),)))
            messager.handle(PeerLost(PeerId("x#1"), "gone"))
        world.submit(20, 5)
