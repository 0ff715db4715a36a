"""Random lives: whatever happens in whatever order, each admitted request ends once and nothing is left."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from driver import Driver, new_request, peer

from kvrelay.machine.contract import PeerLost
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, Load, Message
from kvrelay.protocol.messages.node_to_router import DecodeNeeded
from kvrelay.protocol.messages.router_to_node import AssignDecode, Generate, Prefill
from kvrelay.protocol.request import FinishReason
from router.events import CancelRequested, ClientGone, RequestEnded, RequestErrored, StopMatched
from router.limits import Limits

NODES = ("p0", "p1", "d0", "d1", "m0")
MAX_TOKENS = 6


class Life:
    """A seeded sequence of events. Tokens are their own index, so that order and gaps show."""

    def __init__(self, seed: int, local_prefill_tokens: int | None = None) -> None:
        self.random = random.Random(seed)
        limits = Limits(max_queued_requests=12, node_wait_s=3.0)
        self.driver = Driver(" ".join(NODES), limits=limits, local_prefill_tokens=local_prefill_tokens)
        self.may_lend = local_prefill_tokens is not None
        self.incarnations = Counter[str]()
        self.attempts: list[tuple[str, int, str, str | None, int]] = []
        self.submitted = 0

    def run(self, steps: int) -> None:
        kinds = [self.submit, self.tokens, self.tokens, self.tokens, self.fail, self.refuse, self.lose, self.leave]
        if self.may_lend:
            kinds += [self.beat, self.beat, self.submit]
        for _ in range(steps):
            self.random.choice(kinds)()
            self.notice_dispatches()
            self.driver.wait(self.random.choice((0.0, 0.01, 0.3)))
            self.notice_dispatches()

    def submit(self) -> None:
        self.driver.submit(new_request(f"r{self.submitted}", max_tokens=MAX_TOKENS))
        self.submitted += 1

    def notice_dispatches(self) -> None:
        messages: list[tuple[str, Message]] = [
            *self.driver.take_sent(Prefill),
            *self.driver.take_sent(Generate),
        ]
        for to, message in messages:
            assert isinstance(message, (Prefill, Generate))
            decode = message.decode_node.peer if isinstance(message, Prefill) and message.decode_node else None
            spec = message.request
            assert spec.output_token_ids == self.driver.output(spec.request_id)
            self.attempts.append((spec.request_id, spec.epoch, to, decode, len(spec.output_token_ids)))

    def tokens(self) -> None:
        """One node of some attempt, perhaps an old one, sends a stretch of tokens, perhaps too early or again."""
        if not self.attempts:
            return
        request_id, epoch, entry, decode, start = self.random.choice(self.attempts)
        index = min(MAX_TOKENS - 1, start + self.random.randrange(3))
        sender = entry if index == start or decode is None else decode
        stretch = list(range(index, min(MAX_TOKENS, index + self.random.randrange(1, 3))))
        if sender == entry and decode is not None:
            stretch = stretch[:1]
        finish = FinishReason.LENGTH if stretch[-1] == MAX_TOKENS - 1 else None
        name, _, incarnation = sender.partition("#")
        if incarnation == self.incarnation(name):
            self.driver.tokens_from(sender, index, stretch, epoch=epoch, finish=finish, request_id=request_id)

    def fail(self) -> None:
        if self.attempts and self.random.random() < 0.3:
            request_id, epoch, entry, _, _ = self.random.choice(self.attempts)
            self.driver.fail(entry.partition("#")[0], epoch=epoch, request_id=request_id)

    def refuse(self) -> None:
        if self.attempts:
            request_id, epoch, entry, decode, _ = self.random.choice(self.attempts)
            if decode is not None:
                needed = DecodeNeeded(
                    request_id=RequestId(request_id),
                    epoch=epoch,
                    refused_by=PeerId(decode),
                    reason="full",
                    retry_after_s=0.1,
                )
                self.driver.receive(entry, needed)
                self.driver.take_sent(AssignDecode)

    def lose(self) -> None:
        name = self.random.choice(NODES)
        if self.random.random() < 0.5:
            self.driver.do(PeerLost(PeerId(peer(name, self.incarnation(name))), "killed"))
        self.incarnations[name] += 1
        if self.random.random() < 0.8:
            self.driver.join(name, self.incarnation(name))

    def beat(self) -> None:
        """A decode node tells of room, which it then may have or not."""
        name = self.random.choice(("d0", "d1"))
        load = Load(free_blocks=self.random.randrange(100), num_running=self.random.randrange(9))
        self.driver.receive(peer(name, self.incarnation(name)), Heartbeat(load=load))

    def leave(self) -> None:
        if self.submitted:
            kind = self.random.choice((ClientGone, CancelRequested, StopMatched))
            self.driver.do(kind(RequestId(f"r{self.random.randrange(self.submitted)}")))

    def incarnation(self, name: str) -> str:
        return f"a{self.incarnations[name]}" if self.incarnations[name] else "a"


@pytest.mark.fault("F18")
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("local_prefill_tokens", [None, 0])
def test_every_request_ends_once_with_its_tokens_in_order_and_nothing_is_left(
    seed: int, local_prefill_tokens: int | None
) -> None:
    life = Life(seed, local_prefill_tokens)
    life.run(150)
    driver = life.driver
    assert (driver.machine.requests.counters.local_prefills > 0) is life.may_lend
    if seed % 2:
        for index in range(life.submitted):
            driver.do(ClientGone(RequestId(f"r{index}")))
        driver.machine.assert_quiescent()  # nodes that are still there have nothing to do either
    for name in NODES:
        driver.do(PeerLost(PeerId(peer(name, life.incarnation(name))), "the end"))
    driver.wait(20.0)
    driver.machine.assert_quiescent()
    assert life.submitted > 0
    for index in range(life.submitted):
        request_id = f"r{index}"
        assert driver.output(request_id) == list(range(len(driver.output(request_id))))
        assert len(driver.endings(request_id)) == 1
        last = driver.delivered[request_id][-1]
        assert isinstance(last, (RequestEnded, RequestErrored))
    assert not [key for key in driver.timers if key != "liveness"]
    counters = driver.machine.requests.counters
    assert counters.submitted == counters.finished + counters.failed + counters.aborted
    assert counters.submitted + counters.refused == life.submitted
