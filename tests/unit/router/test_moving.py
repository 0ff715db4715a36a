"""Preempted requests are given to nodes that have room."""

from __future__ import annotations

from typing import Any

from driver import Driver, new_request, peer

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.base import Heartbeat, Load
from kvrelay.protocol.messages.node_to_router import RequestPreempted
from kvrelay.protocol.messages.router_to_node import Abort, Generate, Prefill
from kvrelay.protocol.request import FinishReason
from router.events import ClientGone


def room(free: int, reserved: int = 0, **fields: Any) -> Heartbeat:
    load = Load(free_blocks=free, evictable_blocks=0, headroom_blocks=reserved, **fields)
    return Heartbeat(load=load)


def decoding(driver: Driver, request_id: str = "r", epoch: int = 1) -> str:
    """Submit a request and let its decode node send a token after P's; return that node."""
    driver.submit(new_request(request_id, max_tokens=100))
    [(prefill, message)] = driver.take_sent(Prefill)
    assert message.decode_node is not None
    driver.tokens_from(prefill, 0, [10], epoch=epoch, request_id=request_id)
    driver.tokens_from(message.decode_node.peer, 1, [11], epoch=epoch, request_id=request_id)
    return message.decode_node.peer


def preempt(driver: Driver, node: str, num_blocks: int = 5, epoch: int = 1, request_id: str = "r") -> None:
    driver.receive(node, RequestPreempted(request_id=RequestId(request_id), epoch=epoch, num_blocks=num_blocks))


def other(node: str) -> str:
    return peer("d1") if node == peer("d0") else peer("d0")


def test_it_goes_on_where_there_is_room_with_all_it_has_generated() -> None:
    driver = Driver("p0 d0 d1")
    source = decoding(driver)
    driver.receive(other(source), room(5))
    preempt(driver, source)
    assert [(to, message.epoch) for to, message in driver.take_sent(Abort)] == [(source, 1)]
    [(target, generate)] = driver.take_sent(Generate)
    assert target == other(source)
    assert generate.request.epoch == 2
    assert generate.request.output_token_ids == [10, 11]
    driver.tokens_from(source, 2, [99])  # it was resuming just then
    driver.tokens_from(target, 2, [12], epoch=2, finish=FinishReason.LENGTH)
    assert driver.output() == [10, 11, 12]
    assert len(driver.endings()) == 1
    assert driver.machine.requests.counters.moved == 1
    assert driver.machine.requests.counters.retries == 0
    driver.machine.assert_quiescent()


def test_it_waits_until_a_heartbeat_tells_of_room() -> None:
    driver = Driver("p0 d0 d1")
    source = decoding(driver)
    preempt(driver, source)
    driver.receive(other(source), room(4))
    driver.receive(other(source), room(9, reserved=5))
    driver.receive(other(source), room(9, num_waiting=1))
    assert not driver.take_sent(Generate)
    driver.receive(other(source), room(9, reserved=4))
    assert len(driver.take_sent(Generate)) == 1


def test_one_that_resumed_meanwhile_stays() -> None:
    driver = Driver("p0 d0 d1")
    source = decoding(driver)
    preempt(driver, source)
    driver.tokens_from(source, 2, [12])
    driver.receive(other(source), room(100))
    assert not driver.take_sent(Generate)


def test_the_same_room_is_not_given_away_twice() -> None:
    driver = Driver("p0 d0 d1")
    first = decoding(driver, "a", 1)
    second = decoding(driver, "b", 2)
    if first == second:
        target = other(first)
    else:
        driver.join("d2")
        target = peer("d2")
    driver.receive(target, room(8))
    preempt(driver, first, 5, 1, "a")
    preempt(driver, second, 5, 2, "b")
    assert len(driver.take_sent(Generate)) == 1
    driver.receive(target, room(5))
    assert len(driver.take_sent(Generate)) == 1


def test_a_client_that_left_moves_nowhere() -> None:
    driver = Driver("p0 d0 d1")
    source = decoding(driver)
    preempt(driver, source)
    driver.do(ClientGone(RequestId("r")))
    driver.receive(other(source), room(100))
    assert not driver.take_sent(Generate)
    driver.machine.assert_quiescent()


def test_a_node_with_an_old_attempt_is_told_to_end_it() -> None:
    driver = Driver("p0 d0 d1")
    decoding(driver)
    preempt(driver, peer("d1"), epoch=7)
    assert [(to, message.epoch) for to, message in driver.take_sent(Abort)] == [(peer("d1"), 7)]


def test_a_mixed_node_takes_it_too() -> None:
    driver = Driver("p0 d0 d1")
    source = decoding(driver)
    driver.join("m0")
    driver.receive(peer("m0"), room(50))
    preempt(driver, source)
    assert [to for to, _ in driver.take_sent(Generate)] == [peer("m0")]
