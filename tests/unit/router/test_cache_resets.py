"""Resets of all prefix caches, as the router sees them: every node's answer is reported, or that there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from driver import Driver, peer
from test_operators import Service

from kvrelay.errors import LocalProtocolError, NoNodeError
from kvrelay.machine.contract import PeerLost, TimerFired
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Heartbeat
from kvrelay.protocol.messages.node_to_router import PrefixCacheReset
from kvrelay.protocol.messages.router_to_node import ResetPrefixCache
from router.events import CacheResetEnded, CacheResetRequested, NodeReset
from router.machine import RouterEvent
from router.nodes import LIVENESS
from router.prefixes import NodePrefixes


class Resetting(Driver):
    """With nodes that can read the message. ``ended``: what the router reports."""

    def __init__(self, names: str = "p d") -> None:
        self.ended: list[CacheResetEnded] = []
        super().__init__()
        for name in names.split():
            self.join(name, resets_prefix_cache=True)

    def do(self, event: RouterEvent) -> Sequence[object]:
        actions = super().do(event)
        self.ended += (action for action in actions if isinstance(action, CacheResetEnded))
        return actions

    def reset(self, number: int = 1) -> None:
        self.do(CacheResetRequested(number))

    def answer(self, name: str, number: int = 1, blocks: int = 3) -> None:
        self.receive(peer(name), PrefixCacheReset(reset=number, num_blocks=blocks))

    def beat(self, alive: str) -> None:
        """Let a second pass in which nobody but ``alive`` sends something."""
        self.now += 1.0
        for name in alive.split():
            self.receive(peer(name), Heartbeat())
        self.do(TimerFired(LIVENESS))

    def asked(self) -> list[tuple[str, int]]:
        """Return whom the router has asked for which reset since the last call."""
        found = [(to, message.reset) for to, message in self.sent if isinstance(message, ResetPrefixCache)]
        self.sent.clear()
        return found


def test_it_ends_when_every_node_has_answered() -> None:
    router = Resetting()
    router.reset()
    assert router.asked() == [(peer("p"), 1)]
    router.answer("p", blocks=0)
    assert router.ended == []
    assert router.asked() == [(peer("d"), 1)]  # not before: what p still hands off must be there when d is reset
    router.answer("d", blocks=5)
    assert router.ended == [CacheResetEnded(1, (NodeReset("p", "reset", 0), NodeReset("d", "reset", 5)))]  # type: ignore[arg-type]
    router.machine.assert_quiescent()


def test_a_node_that_does_not_answer_is_asked_again_and_reported_in_the_end() -> None:
    router = Resetting()
    router.reset()
    router.answer("d")
    router.asked()
    for _ in range(4):
        router.beat("p d")
        assert router.asked() == [(peer("p"), 1)]
    router.beat("p d")
    assert [node.state for node in router.ended[0].nodes] == ["no_answer", "reset"]
    router.machine.assert_quiescent()
    router.answer("p")
    assert len(router.ended) == 1


def test_a_prefill_node_that_does_not_answer_keeps_no_decode_node_from_its_reset() -> None:
    router = Resetting()
    router.reset()
    router.asked()
    asked = []
    for _ in range(3):
        router.beat("p d")
        asked.append(router.asked())
    assert asked == [[(peer("p"), 1)], [(peer("p"), 1)], [(peer("p"), 1), (peer("d"), 1)]]
    router.answer("d")
    for _ in range(2):
        router.beat("p d")
    assert [node.state for node in router.ended[0].nodes] == ["no_answer", "reset"]


def test_decode_nodes_are_asked_when_the_last_prefill_node_is_lost() -> None:
    router = Resetting("p p1 d")
    router.reset()
    router.answer("p1")
    router.asked()
    router.do(PeerLost(PeerId(peer("p")), "it exited"))
    router.beat("p1 d")
    assert router.asked() == [(peer("d"), 1)]


def test_a_node_that_is_lost_meanwhile_is_reported_so() -> None:
    router = Resetting()
    router.reset()
    router.answer("p")
    router.do(PeerLost(PeerId(peer("d")), "it exited"))
    router.join("d", "b", resets_prefix_cache=True)
    router.beat("p")
    assert [node.state for node in router.ended[0].nodes] == ["reset", "lost"]


def test_a_node_that_cannot_read_the_message_does_not_get_it() -> None:
    router = Resetting("p")
    router.join("d")
    router.reset()
    assert router.asked() == [(peer("p"), 1)]
    router.answer("p")
    assert [node.state for node in router.ended[0].nodes] == ["reset", "unsupported"]


def test_without_nodes_there_is_nothing_to_wait_for() -> None:
    router = Resetting("")
    router.reset()
    assert router.ended == [CacheResetEnded(1, ())]


def test_resets_at_the_same_time_are_told_apart() -> None:
    router = Resetting("p")
    router.reset(1)
    router.reset(2)
    router.answer("p", 2)
    router.answer("p", 7)
    assert [ended.reset for ended in router.ended] == [2]
    with pytest.raises(LocalProtocolError, match="1 resets of prefix caches are in progress"):
        router.machine.assert_quiescent()


def test_what_the_router_knew_and_expected_is_forgotten() -> None:
    router = Resetting("p")
    node = router.machine.node_table.get(PeerId(peer("p")))
    assert node is not None
    node.prefixes = NodePrefixes()
    node.prefixes.reported = {b"a"}
    node.prefixes._expected = {b"b": 0}
    assert node.prefixes.num_cached_blocks([b"a", b"b"]) == 2
    router.answer("p")
    assert node.prefixes.num_cached_blocks([b"a", b"b"]) == 0


def test_a_router_that_ends_says_so_to_whoever_waits() -> None:
    service = Service()

    async def scenario() -> None:
        waiting = asyncio.create_task(service.reset_prefix_caches())
        await asyncio.sleep(0)
        assert isinstance(service.posted[-1], CacheResetRequested)
        service.ended.set()
        service._end_all()
        with pytest.raises(NoNodeError):
            await waiting
        with pytest.raises(NoNodeError):
            await service.reset_prefix_caches()

    asyncio.run(scenario())
