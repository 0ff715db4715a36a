"""When a request that is over gives its blocks back: when it has no holder and is in no plan in flight."""

from __future__ import annotations

import pytest
from support.machines import node_config, registration, spec

from decode_node.machine import DecodeMachine
from decode_node.request import DecodeRequest, DecodeStatus
from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import Send, StepFailed
from kvrelay.node.in_flight import PlanInFlight
from kvrelay.node.plans import Chunk
from kvrelay.node.request import Holder
from kvrelay.protocol.messages.node_to_messager import CancelKV


class Closing:
    """A request with two blocks and a node's endings."""

    def __init__(self) -> None:
        node = node_config(Role.DECODE)
        machine = DecodeMachine(node, registration(node))
        self.kv, self.requests, self.endings, self.outbox = (
            machine.kv,
            machine.requests,
            machine._endings,
            machine._outbox,
        )
        self.scheduler = machine.scheduler
        self.request = DecodeRequest(spec("r", 8), [], DecodeStatus.RESERVING, 0.0)
        self.request.take_blocks(self.kv.allocate(2))
        self.requests.add(self.request)

    def messages(self, kind: type) -> int:
        """Return how many messages of ``kind`` were sent since the last call."""
        return sum(isinstance(action, Send) and isinstance(action.message, kind) for action in self.outbox.take())


@pytest.mark.parametrize("holder", [Holder.MESSAGER, Holder.STORE])
def test_blocks_stay_until_the_last_holder_releases_them(holder: Holder) -> None:
    closing = Closing()
    closing.request.holders.add(holder)
    seen = []
    closing.endings.close(closing.request, "over")
    seen.append((closing.request.status, closing.kv.num_referenced))
    closing.endings.release(closing.request, holder)
    seen.append((closing.request.status, closing.kv.num_referenced))
    assert seen == [(DecodeStatus.CLOSING, 2), (DecodeStatus.ENDED, 0)]
    closing.endings.release(closing.request, holder)  # twice is no fault


def test_only_a_messager_that_uses_the_blocks_is_told_to_stop() -> None:
    closing = Closing()
    closing.endings.close(closing.request, "over")
    assert closing.messages(CancelKV) == 0
    closing = Closing()
    closing.request.holders.add(Holder.MESSAGER)
    closing.endings.close(closing.request, "over")
    assert closing.messages(CancelKV) == 1


def test_blocks_stay_until_no_plan_in_flight_has_the_request() -> None:
    closing = Closing()
    scheduler, request = closing.scheduler, closing.request
    plan = scheduler.plans.write(1, [request], [Chunk(0, 8, True)])
    scheduler.in_flight.begin(PlanInFlight(plan, [request], [Chunk(0, 8, True)], 0.0))
    closing.endings.close(request, "over")
    assert closing.kv.num_referenced == 2
    scheduler.in_flight.end(StepFailed(1, "the test says so"))
    closing.endings.end_if_unused(request)
    assert closing.kv.num_referenced == 0
    assert not closing.requests


def test_a_holder_that_ends_while_the_request_goes_on_ends_nothing() -> None:
    closing = Closing()
    closing.request.holders.add(Holder.MESSAGER)
    closing.endings.release(closing.request, Holder.MESSAGER)
    assert closing.request.status is DecodeStatus.RESERVING
    assert closing.kv.num_referenced == 2
