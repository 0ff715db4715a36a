from __future__ import annotations

import pytest
from driver import Driver, new_request, peer
from msgspec import structs

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import PeerLost, Received, Resumed, StopRequested
from kvrelay.protocol.ids import Attempt, NodeId, PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, LayerTransfer, Mark
from kvrelay.protocol.messages.node_to_router import AttemptsHeld, Drained, Leaving, RequestTimeline
from kvrelay.protocol.messages.router_to_node import Abort, AssignDecode, Drain, Generate, Registered
from kvrelay.protocol.request import FinishReason
from router.events import (
    CancelRequested,
    ClientGone,
    ClientsFinished,
    DrainRequested,
    RequestEnded,
    RequestErrored,
    StopMatched,
    TokensDelivered,
)
from router.limits import Limits
from router.machine import LAST_CLIENTS_S
from router.requests import MAX_DISPATCHED_AT_ONCE

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


# ---------------------------------------------------------------- the happy path


def test_a_pair_serves_a_request() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    entry, decode, spec = driver.dispatched()
    assert (entry, decode, spec.epoch, spec.output_token_ids) == (peer("p0"), peer("d0"), 1, [])
    driver.tokens("p0", 0, [10])
    driver.tokens("d0", 1, [11, 12])
    driver.tokens("d0", 3, [13], finish=STOP)
    assert driver.output() == [10, 11, 12, 13]
    assert driver.endings() == [RequestEnded(STOP)]
    assert driver.take_sent(Abort) == []
    driver.machine.assert_quiescent()


def test_a_mixed_node_serves_a_request() -> None:
    driver = Driver("m0")
    driver.submit()
    assert driver.dispatched()[:2] == (peer("m0"), None)
    driver.tokens("m0", 0, [1, 2], finish=LENGTH)
    assert driver.output() == [1, 2]
    driver.machine.assert_quiescent()


def test_mixed_nodes_and_pairs_share_the_work() -> None:
    driver = Driver("p0 d0 m0")
    driver.submit(*(new_request(f"r{i}") for i in range(8)))
    entries = {node.node_id: len(node.pending) for node in driver.machine.node_table}
    assert entries == {"p0": 4, "d0": 4, "m0": 4}


def test_one_token_needs_no_decode_node() -> None:
    driver = Driver("p0 d0")
    driver.submit(new_request(max_tokens=1))
    assert driver.dispatched()[1] is None
    driver.tokens("p0", 0, [5], finish=LENGTH)
    driver.machine.assert_quiescent()


@pytest.mark.fault("F28")
@pytest.mark.parametrize("name", ["d1", "p1", "x9"])
def test_tokens_of_who_has_no_part_in_the_attempt_are_not_delivered(name: str) -> None:
    """Before, whoever knew request id and epoch could write into the answer."""
    driver = Driver("p0 d0")
    driver.submit()
    if name != "x9":
        driver.join(name)
    driver.tokens(name, 0, [66, 66], finish=STOP)
    driver.tokens("p0", 0, [10])
    driver.tokens("d0", 1, [11])
    driver.tokens(name, 2, [66], finish=STOP)
    driver.tokens("d0", 2, [12], finish=LENGTH)
    assert driver.output() == [10, 11, 12]
    assert driver.endings() == [RequestEnded(LENGTH)]
    driver.machine.assert_quiescent()


# ---------------------------------------------------------------- order of output


def test_second_token_before_the_first_is_held() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.tokens("d0", 1, [11])
    driver.tokens("d0", 2, [12], finish=LENGTH)
    assert driver.output() == []
    driver.tokens("p0", 0, [10], num_cached_tokens=2)
    assert driver.output() == [10, 11, 12]
    told = [item.num_cached_tokens for item in driver.delivered["r"] if isinstance(item, TokensDelivered)]
    assert told == [2, 2, 2]
    timeline = driver.machine.requests.timelines.get(RequestId("r"))
    assert timeline is not None
    assert "first_token" in str(timeline["marks"])
    assert driver.endings() == [RequestEnded(LENGTH)]
    driver.machine.assert_quiescent()


def test_tokens_said_twice_are_delivered_once() -> None:
    driver = Driver("m0")
    driver.submit()
    driver.tokens("m0", 0, [1, 2])
    driver.tokens("m0", 0, [1, 2])
    driver.tokens("m0", 1, [2, 3])
    assert driver.output() == [1, 2, 3]


@pytest.mark.fault("F06")
def test_tokens_of_an_ended_request_are_answered_with_abort() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.do(ClientGone(RequestId("r")))
    assert driver.take_sent(Abort) == [
        (peer("p0"), Abort(request_id=RequestId("r"), epoch=1)),
        (peer("d0"), Abort(request_id=RequestId("r"), epoch=1)),
    ]
    driver.tokens("d0", 1, [4])
    driver.tokens("d0", 2, [4], finish=LENGTH)
    assert driver.take_sent(Abort) == [(peer("d0"), Abort(request_id=RequestId("r"), epoch=1))]
    assert driver.machine.requests.counters.stale_messages == 2


@pytest.mark.fault("F09")
def test_a_node_that_was_lost_is_told_which_of_its_attempts_are_over() -> None:
    driver = Driver("p0 d0")
    driver.submit(new_request("a"), new_request("b"))
    driver.do(PeerLost(PeerId(peer("p0")), "it stood still"))
    driver.join("p0")
    driver.take_sent(Abort)
    held = [Attempt(RequestId(name), epoch) for name, epoch in (("a", 1), ("a", 3), ("b", 4), ("c", 5))]
    driver.receive(peer("p0"), AttemptsHeld(attempts=held))
    assert driver.take_sent(Abort) == [
        (peer("p0"), Abort(request_id=RequestId("a"), epoch=1)),
        (peer("p0"), Abort(request_id=RequestId("c"), epoch=5)),
    ]
    driver.join("p1")
    driver.receive(peer("p1"), AttemptsHeld(attempts=held[1:2]))
    assert driver.take_sent(Abort) == [(peer("p1"), Abort(request_id=RequestId("a"), epoch=3))], "it has no part in it"


@pytest.mark.fault("F14")
def test_an_id_used_again_is_not_taken_for_its_earlier_use() -> None:
    driver = Driver("m0")
    driver.submit()
    driver.do(ClientGone(RequestId("r")))
    driver.submit()
    driver.tokens("m0", 0, [99], epoch=1)
    driver.tokens("m0", 0, [1], epoch=2)
    assert driver.output() == [1]


def test_an_id_in_use_is_a_bug_of_ours() -> None:
    driver = Driver("m0")
    driver.submit()
    with pytest.raises(LocalProtocolError, match="in use"):
        driver.submit()


# ---------------------------------------------------------------- the client's word


def test_client_gone_after_the_first_decode_token_aborts_decode_alone() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.tokens("p0", 0, [1])
    driver.tokens("d0", 1, [2])
    driver.do(ClientGone(RequestId("r")))
    assert [to for to, _ in driver.take_sent(Abort)] == [peer("d0")]
    assert driver.endings() == [RequestEnded(FinishReason.ABORT)]
    driver.machine.assert_quiescent()


@pytest.mark.fault("F08")
def test_cancelled_request_is_aborted_on_both_nodes_at_once_and_ends_with_an_error() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.do(CancelRequested(RequestId("r")))
    assert [to for to, _ in driver.take_sent(Abort)] == [peer("p0"), peer("d0")]
    [end] = driver.endings()
    assert isinstance(end, RequestErrored)
    assert (end.error.code, end.error.http_status) == ("request_cancelled", 410)
    driver.machine.assert_quiescent()
    driver.do(CancelRequested(RequestId("r")))  # too late
    assert driver.take_sent(Abort) == []


def test_stop_string_aborts_and_finishes() -> None:
    driver = Driver("m0")
    driver.submit()
    driver.tokens("m0", 0, [1])
    driver.do(StopMatched(RequestId("r")))
    assert [to for to, _ in driver.take_sent(Abort)] == [peer("m0")]
    assert driver.endings() == [RequestEnded(STOP)]
    driver.machine.assert_quiescent()


def test_the_word_of_a_client_whose_request_has_ended_changes_nothing() -> None:
    driver = Driver("m0")
    driver.submit()
    driver.tokens("m0", 0, [1], finish=STOP)
    assert driver.do(ClientGone(RequestId("r"))) == driver.do(StopMatched(RequestId("r"))) == []
    assert len(driver.endings()) == 1


# ---------------------------------------------------------------- admission


@pytest.mark.fault("F03", "F04")
def test_too_many_requests_are_refused_all_together() -> None:
    driver = Driver("m0", limits=Limits(max_queued_requests=2))
    driver.submit(new_request("a"))
    driver.submit(new_request("b"), new_request("c"))
    for request_id in "bc":
        (ending,) = driver.endings(request_id)
        assert isinstance(ending, RequestErrored)
        assert (ending.error.http_status, ending.retry_after_s) == (429, 1.0)
    driver.submit(new_request("d"))
    assert driver.endings("d") == []


def test_many_requests_are_dispatched_in_several_events() -> None:
    """One event with all of them would hold the loop."""
    driver = Driver("m0")
    ids = [f"r{index}" for index in range(MAX_DISPATCHED_AT_ONCE + 3)]
    driver.submit(*map(new_request, ids))
    first, (gone, *others) = ids[:MAX_DISPATCHED_AT_ONCE], ids[MAX_DISPATCHED_AT_ONCE:]
    assert [message.request.request_id for _, message in driver.take_sent(Generate)] == first
    driver.do(ClientGone(RequestId(gone)))
    driver.wait(0.0)
    assert [message.request.request_id for _, message in driver.take_sent(Generate)] == others


@pytest.mark.parametrize("nodes", ["", "p0", "d0", "p0 p1"])
def test_without_nodes_that_can_serve_it_is_503_at_once(nodes: str) -> None:
    driver = Driver(nodes, limits=Limits(node_wait_s=10.0))
    assert driver.machine.unready_reason() is not None
    driver.now += 10.1  # a router that has just started waits for nodes
    driver.submit()
    assert driver.error_code() == "no_node_available"


@pytest.mark.parametrize("nodes", ["", "p0", "d0"])
def test_router_that_has_just_started_waits_for_nodes(nodes: str) -> None:
    driver = Driver(nodes, limits=Limits(node_wait_s=10.0))
    driver.now += 3.0
    driver.submit()
    assert driver.endings() == []
    driver.join("m0")
    assert driver.dispatched()[0] == peer("m0")


def test_router_that_has_just_started_does_not_wait_for_ever() -> None:
    driver = Driver(limits=Limits(node_wait_s=10.0))
    driver.wait(3.0)
    driver.submit()
    driver.wait(9.9)
    assert driver.endings() == []
    driver.wait(0.2)
    assert driver.error_code() == "no_node_available"
    driver.machine.assert_quiescent()


@pytest.mark.parametrize("how", ["killed", "leaving", "drained"])
def test_request_that_comes_while_the_only_node_restarts_waits_for_it(how: str) -> None:
    driver = Driver("m0", limits=Limits(node_wait_s=10.0))
    driver.do(PeerLost(PeerId(peer("m0")), "killed") if how == "killed" else Received(PeerId(peer("m0")), Leaving()))
    if how == "drained":
        driver.receive(peer("m0"), Drained())
    driver.wait(3.0)
    assert driver.machine.unready_reason() is not None
    driver.submit()
    driver.join("m0", "b")
    if how == "leaving":  # the router asked whether it is still there
        driver.do(PeerLost(PeerId(peer("m0")), "Host unreachable"))
    assert driver.dispatched()[0] == peer("m0", "b")


def test_node_that_does_not_come_back_is_503_and_then_503_at_once() -> None:
    driver = Driver("m0", limits=Limits(node_wait_s=10.0))
    driver.do(PeerLost(PeerId(peer("m0")), "killed"))
    driver.submit()
    driver.wait(10.1)
    assert driver.error_code() == "no_node_available"
    driver.submit(new_request("later"))
    assert driver.error_code("later") == "no_node_available"
    driver.machine.assert_quiescent()


def test_ready_with_a_pair_or_a_mixed_node() -> None:
    assert Driver("p0 d0").machine.unready_reason() is None
    assert Driver("m0").machine.unready_reason() is None


# ---------------------------------------------------------------- refused decode


def test_refused_reservation_goes_to_another_decode_node() -> None:
    driver = Driver("p0 d0 d1")
    driver.submit()
    _, decode, _ = driver.dispatched()
    assert decode == peer("d0")
    driver.decode_needed("p0", "d0")
    ((to, assign),) = driver.take_sent(AssignDecode)
    assert (to, assign.decode_node.peer, assign.epoch) == (peer("p0"), peer("d1"), 1)
    driver.decode_needed("p0", "d0")  # said again, since nothing got through
    assert driver.take_sent(AssignDecode) == [(to, assign)]
    driver.tokens("p0", 0, [1])
    driver.tokens("d1", 1, [2], finish=STOP)
    driver.machine.assert_quiescent()


def test_refusal_said_again_after_decode_began_changes_nothing() -> None:
    driver = Driver("p0 d0 d1")
    driver.submit()
    driver.decode_needed("p0", "d0")
    driver.tokens("p0", 0, [1])
    driver.tokens("d1", 1, [2])
    driver.take_sent(AssignDecode)
    driver.decode_needed("p0", "d0")
    assert not driver.take_sent(Abort) and not driver.take_sent(AssignDecode)
    driver.tokens("d1", 2, [3], finish=STOP)
    assert driver.output() == [1, 2, 3]


def test_decode_node_that_sends_tokens_is_the_one_that_has_the_request() -> None:
    """Two assignments crossed: P asked d0, the router believes in d1."""
    driver = Driver("p0 d0 d1")
    driver.submit()
    driver.decode_needed("p0", "d0")
    driver.tokens("p0", 0, [1])
    driver.tokens("d0", 1, [2])
    driver.do(PeerLost(PeerId(peer("d1")), "killed"))
    assert driver.machine.requests.counters.retries == 0
    driver.do(ClientGone(RequestId("r")))
    assert [to for to, _ in driver.take_sent(Abort)] == [peer("d0")]
    driver.machine.assert_quiescent()


def test_tokens_from_a_decode_node_end_the_search_for_one() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.decode_needed("p0", "d0", retry_after_s=0.1)
    driver.tokens("p0", 0, [1])
    driver.tokens("d0", 1, [2])
    driver.wait(1.0)
    assert driver.take_sent(AssignDecode) == []
    driver.tokens("d0", 2, [3], finish=STOP)
    driver.machine.assert_quiescent()


def test_the_only_decode_node_is_asked_again_after_the_time_it_named() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.decode_needed("p0", "d0", retry_after_s=2.0)
    assert driver.take_sent(AssignDecode) == []
    driver.wait(1.9)
    assert driver.take_sent(AssignDecode) == []
    driver.wait(0.2)
    assert [to for to, _ in driver.take_sent(AssignDecode)] == [peer("p0")]


def test_a_new_decode_node_is_asked_at_once() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.decode_needed("p0", "d0", retry_after_s=60.0)
    driver.join("d1")
    ((_, assign),) = driver.take_sent(AssignDecode)
    assert assign.decode_node.peer == peer("d1")


def test_decode_nodes_that_stay_full_end_the_request_at_its_deadline() -> None:
    driver = Driver("p0 d0", limits=Limits(request_timeout_s=3.0))
    driver.submit()
    for _ in range(20):
        driver.decode_needed("p0", "d0", retry_after_s=0.5)
        driver.wait(0.4)
        for name in ("p0", "d0"):
            driver.join(name)
    assert driver.error_code() == "no_node_available"
    assert peer("p0") in [to for to, _ in driver.take_sent(Abort)]
    driver.machine.assert_quiescent()


@pytest.mark.fault("F06")
def test_decode_needed_for_an_ended_request_is_answered_with_abort() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.do(ClientGone(RequestId("r")))
    driver.take_sent(Abort)
    driver.decode_needed("p0", "d0")
    assert driver.take_sent(Abort) == [(peer("p0"), Abort(request_id=RequestId("r"), epoch=1))]


# ---------------------------------------------------------------- failover


def test_lost_decode_node_goes_on_elsewhere_behind_the_delivered_tokens() -> None:
    driver = Driver("p0 d0 d1")
    driver.submit()
    driver.dispatched()
    driver.tokens("p0", 0, [10])
    driver.tokens("d0", 1, [11])
    driver.do(PeerLost(PeerId(peer("d0")), "killed"))
    _, decode, spec = driver.dispatched()
    assert (decode, spec.epoch, spec.output_token_ids) == (peer("d1"), 2, [10, 11])
    driver.tokens("p0", 2, [12], epoch=2)
    driver.tokens("d1", 3, [13], epoch=2, finish=STOP)
    assert driver.output() == [10, 11, 12, 13]
    assert driver.endings() == [RequestEnded(STOP)]
    driver.machine.assert_quiescent()


def test_lost_prefill_node_aborts_its_decode_node() -> None:
    driver = Driver("p0 p1 d0")
    driver.submit()
    entry, _, _ = driver.dispatched()
    driver.do(PeerLost(PeerId(entry), "killed"))
    assert driver.take_sent(Abort) == [(peer("d0"), Abort(request_id=RequestId("r"), epoch=1))]
    assert driver.dispatched()[0] == peer("p1")


def test_prefill_node_lost_after_decode_began_changes_nothing() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.tokens("p0", 0, [1])
    driver.tokens("d0", 1, [2])
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    driver.tokens("d0", 2, [3], finish=STOP)
    assert driver.output() == [1, 2, 3]
    assert driver.machine.requests.counters.retries == 0


def test_prefill_node_lost_with_its_token_after_decode_began_is_tried_again() -> None:
    """Its token was on the way when it died; tokens of the decode node have waited for it."""
    driver = Driver("p0 p1 d0")
    driver.submit()
    driver.dispatched()
    driver.tokens("d0", 1, [2])
    assert driver.output() == []
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    assert driver.dispatched()[0] == peer("p1")
    driver.tokens("p1", 0, [1], epoch=2)
    driver.tokens("d0", 1, [2], epoch=2, finish=STOP)
    assert driver.output() == [1, 2]
    driver.machine.assert_quiescent()


def test_failure_of_a_prefill_node_that_has_handed_off_changes_nothing() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.tokens("d0", 1, [2])
    driver.tokens("p0", 0, [1])
    driver.tokens("d0", 2, [3])
    driver.fail("p0")
    driver.tokens("d0", 3, [4], finish=STOP)
    assert driver.output() == [1, 2, 3, 4]
    assert driver.machine.requests.counters.retries == 0


def test_tokens_that_came_too_early_die_with_their_attempt() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.tokens("d0", 1, [77])
    driver.fail("d0")
    driver.wait(1.0)
    driver.tokens("p0", 0, [1], epoch=2)
    assert driver.output() == [1]


def test_retryable_failure_is_tried_again_with_backoff_and_then_final() -> None:
    """The last attempt waits until a dead node would be known to be dead."""
    driver = Driver("m0", limits=Limits(max_attempts=3, retry_backoff_s=0.1, peer_timeout_s=4.0))
    driver.submit()
    for epoch, backoff_s in ((1, 0.1), (2, 4.0)):
        assert driver.dispatched()[2].epoch == epoch
        driver.fail("m0", epoch=epoch)
        driver.wait(backoff_s * 0.9)
        assert not driver.delivered["r"]
        driver.wait(backoff_s * 0.2)
    driver.dispatched()
    driver.fail("m0", epoch=3)
    assert driver.error_code() == "engine_error"
    driver.machine.assert_quiescent()


def test_failure_that_would_repeat_is_final_at_once_and_the_partner_is_aborted() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.fail("p0", retryable=False)
    assert driver.error_code() == "engine_error"
    assert driver.take_sent(Abort) == [(peer("d0"), Abort(request_id=RequestId("r"), epoch=1))]
    driver.machine.assert_quiescent()


@pytest.mark.parametrize("nodes", ["m0", "p0 d0"])
def test_nodes_whose_logprobs_of_the_prompt_were_lost_are_aborted(nodes: str) -> None:
    driver = Driver(nodes)
    request = new_request()
    driver.submit(structs.replace(request, sampling=structs.replace(request.sampling, num_prompt_logprobs=0)))
    driver.tokens(nodes.split(maxsplit=1)[0], 0, [10])
    assert {to for to, _ in driver.take_sent(Abort)} == {peer(name) for name in nodes.split()}
    assert driver.output() == [] and driver.machine.requests.counters.retries == 1


def test_failure_of_an_earlier_attempt_changes_nothing() -> None:
    driver = Driver("m0")
    driver.submit()
    driver.fail("m0")
    driver.wait(1.0)
    driver.fail("m0", epoch=1, retryable=False)
    assert driver.endings() == []


def test_retry_prefers_a_node_that_has_not_failed_it() -> None:
    driver = Driver("m0 m1")
    driver.submit()
    driver.dispatched()
    driver.submit(*(new_request(f"busy{i}") for i in range(9)))
    driver.fail("m0")
    driver.sent.clear()
    driver.wait(1.0)
    assert driver.dispatched()[0] == peer("m1")


def test_retry_avoids_the_partner_of_the_node_that_failed_too() -> None:
    driver = Driver("p0 p1 d0 d1")
    driver.submit()
    first = driver.dispatched()
    driver.fail(first[0].partition("#")[0])
    driver.wait(0.1)
    second = driver.dispatched()
    assert {*first[:2], *second[:2]} == {peer(name) for name in ("p0", "p1", "d0", "d1")}


def test_untried_nodes_are_tried_without_a_long_wait() -> None:
    driver = Driver("m0 m1 m2", limits=Limits(max_attempts=3, peer_timeout_s=60.0))
    driver.submit()
    for epoch in (1, 2):
        entry, _, _ = driver.dispatched()
        driver.fail(entry.partition("#")[0], epoch=epoch)
        driver.wait(0.3)
    driver.dispatched()


def test_request_that_lost_its_only_node_waits_for_it_to_come_back() -> None:
    driver = Driver("m0")
    driver.submit()
    driver.dispatched()
    driver.tokens("m0", 0, [1])
    driver.do(PeerLost(PeerId(peer("m0")), "killed"))
    driver.wait(5.0)
    driver.join("m0", "b")
    entry, _, spec = driver.dispatched()
    assert (entry, spec.output_token_ids) == (peer("m0", "b"), [1])


def test_request_that_lost_its_only_node_for_good_ends() -> None:
    driver = Driver("m0", limits=Limits(node_wait_s=10.0))
    driver.submit()
    driver.do(PeerLost(PeerId(peer("m0")), "killed"))
    driver.wait(9.9)
    assert driver.endings() == []
    driver.wait(0.2)
    assert driver.error_code() == "no_node_available"
    driver.machine.assert_quiescent()


def test_request_timeout_ends_and_aborts() -> None:
    driver = Driver("m0", limits=Limits(request_timeout_s=2.0))
    driver.submit()
    driver.wait(2.1)
    assert driver.error_code() == "transfer_timeout"
    assert [to for to, _ in driver.take_sent(Abort)] == [peer("m0")]
    driver.machine.assert_quiescent()


# ---------------------------------------------------------------- nodes and the router leave


@pytest.mark.parametrize("how", ["operator", "node"])
def test_node_that_leaves_gets_nothing_new_and_finishes_what_it_has(how: str) -> None:
    driver = Driver("m0 m1")
    driver.submit()
    if how == "operator":
        driver.do(DrainRequested(NodeId("m0")))
        assert driver.take_sent(Drain) == [(peer("m0"), Drain())]
    else:
        driver.receive(peer("m0"), Leaving())
    driver.dispatched()
    driver.submit(new_request("other"))
    assert driver.dispatched()[0] == peer("m1")
    driver.tokens("m0", 0, [1], finish=STOP)
    driver.receive(peer("m0"), Drained())
    assert [node.node_id for node in driver.machine.node_table] == ["m1"]
    assert driver.machine.requests.counters.nodes_lost == 0


def test_stopping_router_finishes_what_its_clients_ask_and_exits_when_they_have_left() -> None:
    driver = Driver("m0")
    driver.submit()
    driver.do(StopRequested())
    assert driver.num_finishes == 1
    assert driver.machine.unready_reason() == "the router is stopping"
    driver.submit(new_request("late"))
    driver.tokens("m0", 0, [1], finish=STOP)
    driver.tokens("m0", 0, [2], finish=STOP, request_id="late", epoch=2)
    assert driver.output("late") == [2]
    assert not driver.exited
    driver.do(ClientsFinished())
    assert driver.num_finishes == 1
    assert driver.exited


def test_stopping_router_finishes_its_requests_when_all_connections_have_ended() -> None:
    driver = Driver("m0")
    driver.submit()
    driver.do(StopRequested())
    driver.do(ClientsFinished())
    assert not driver.exited
    driver.tokens("m0", 0, [1], finish=STOP)
    assert driver.exited


def test_stopping_router_waits_some_seconds_for_clients_that_have_no_request() -> None:
    """They write one, or read an answer. One that does neither would hold up the next router for ever."""
    driver = Driver("m0")
    driver.do(StopRequested())
    driver.wait(LAST_CLIENTS_S - 0.1)
    driver.join("m0")
    driver.submit()
    driver.wait(0.2)
    assert not driver.exited
    driver.tokens("m0", 0, [1], finish=STOP)
    driver.wait(LAST_CLIENTS_S - 0.1)
    driver.join("m0")
    driver.submit(new_request("short"))
    driver.tokens("m0", 0, [1], finish=STOP, request_id="short", epoch=2)
    driver.wait(LAST_CLIENTS_S - 0.1)
    assert not driver.exited
    driver.wait(0.2)
    driver.submit(new_request("late"))
    assert driver.error_code("late") == "no_node_available"
    assert driver.exited


@pytest.mark.parametrize("impatient", [False, True])
def test_stopping_router_does_not_wait_for_ever(impatient: bool) -> None:
    driver = Driver("m0")
    driver.submit()
    driver.do(StopRequested())
    if impatient:
        driver.do(StopRequested())
    else:
        for _ in range(31):
            driver.wait(1.0)
            driver.join("m0")
    assert driver.exited
    assert driver.error_code() == "no_node_available"
    assert driver.take_sent(Abort)


def test_tokens_behind_the_last_one_are_dropped() -> None:
    """No correct node sends any. They were delivered after the end, which ended the router."""
    driver = Driver("p0 d0")
    driver.submit()
    driver.tokens("d0", 1, [2, 3])
    driver.tokens("p0", 0, [1], finish=STOP)
    assert driver.output() == [1]
    assert isinstance(driver.delivered["r"][-1], RequestEnded)
    driver.machine.assert_quiescent()


# ---------------------------------------------------------------- for people


def test_timeline_merges_what_nodes_tell_with_the_routers_own_marks() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.tokens("p0", 0, [1], finish=STOP)
    layers = [LayerTransfer(1, 1.0, 2.0, 100), LayerTransfer(0, 1.0, 2.0, 100)]
    report = RequestTimeline(request_id=RequestId("r"), epoch=1, marks=[Mark("prefill", 999.0, "p0")], layers=layers)
    driver.receive(peer("p0"), report)
    timeline = driver.machine.requests.timelines.get(RequestId("r"))
    assert timeline is not None
    marks = timeline["marks"]
    assert isinstance(marks, list)
    assert [mark["name"] for mark in marks] == ["prefill", "received", "dispatched", "first_token", "done"]
    assert timeline["kv_bytes_moved"] == driver.machine.requests.counters.kv_bytes_moved == 200
    assert isinstance(timeline["layers"], list)
    assert [layer["layer"] for layer in timeline["layers"]] == [0, 1]


def test_what_nodes_tell_of_an_earlier_request_with_the_same_id_is_not_in_the_timeline_of_the_next() -> None:
    driver = Driver("p0 d0", first_epoch=40)
    for epoch in (41, 42):
        driver.submit()
        driver.tokens("p0", 0, [1], epoch=epoch, finish=STOP)
        driver.now += 100.0
    for epoch, at_s in ((41, 1000.0), (42, 1100.0)):
        marks = [Mark("prefill", at_s, "p0")]
        driver.receive(peer("p0"), RequestTimeline(request_id=RequestId("r"), epoch=epoch, marks=marks))
    timeline = driver.machine.requests.timelines.get(RequestId("r"))
    assert timeline is not None
    assert isinstance(timeline["marks"], list)
    assert [mark["at_s"] for mark in timeline["marks"] if mark["node"] == "p0"] == [1100.0]
    inference = driver.machine.requests.timelines.inference
    assert (sum(inference.counts), inference.total) == (1, 0.0)


def test_timelines_are_forgotten_in_the_end() -> None:
    driver = Driver("m0")
    for i in range(300):
        driver.submit(new_request(f"r{i}"))
        driver.do(ClientGone(RequestId(f"r{i}")))
    timelines = driver.machine.requests.timelines
    assert timelines.get(RequestId("r0")) is None
    assert timelines.get(RequestId("r299")) is not None
    driver.receive(peer("m0"), RequestTimeline(request_id=RequestId("r0"), epoch=1, marks=[]))
    assert timelines.get(RequestId("r0")) is None


def test_cached_tokens_are_told_with_the_tokens() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    driver.tokens("p0", 0, [1], num_cached_tokens=2)
    driver.tokens("d0", 1, [2])
    told = [item.num_cached_tokens for item in driver.delivered["r"] if isinstance(item, TokensDelivered)]
    assert told == [2, 2]


# ---------------------------------------------------------------- pauses of the router itself


def test_what_a_draining_node_hands_back_costs_no_attempt() -> None:
    driver = Driver("m0 m1", limits=Limits(max_attempts=1))
    driver.submit()
    first, _, spec = driver.dispatched()
    name = first.partition("#")[0]
    driver.tokens(name, 0, [1, 2])
    driver.do(DrainRequested(NodeId(name)))
    driver.fail(name)
    again, _, spec = driver.dispatched()
    assert again != first
    assert spec.output_token_ids == [1, 2]


def pause(driver: Driver, seconds: float) -> None:
    """Let the router's process stand still: it is told so before it handles anything that came meanwhile."""
    driver.now += seconds
    driver.do(Resumed(seconds))


def test_a_pause_of_the_router_counts_as_no_nodes_silence() -> None:
    driver = Driver("m0 m1")
    driver.wait(2.0)
    pause(driver, 60.0)
    driver.wait(2.0)
    assert len(list(driver.machine.node_table)) == 2
    driver.receive(peer("m0"), Heartbeat())
    driver.wait(1.5)
    assert [node.node_id for node in driver.machine.node_table] == ["m0"]
    driver.wait(10.0)
    assert not list(driver.machine.node_table)


def test_pauses_do_not_keep_a_dead_node_alive() -> None:
    driver = Driver("m0")
    for _ in range(10):
        driver.wait(1.0)
        pause(driver, 3.0)
    assert not list(driver.machine.node_table)


@pytest.mark.fault("F09")
def test_silent_nodes_are_all_gone_before_their_requests_are_retried() -> None:
    driver = Driver("m0 m1 m2", limits=Limits(max_attempts=2))
    driver.submit()
    first, _, _ = driver.dispatched()
    alive = [name for name in ("m0", "m1", "m2") if peer(name) != first][-1]  # the last that a retry would try
    for _ in range(6):
        driver.wait(1.0)
        driver.receive(peer(alive), Heartbeat())
    again, _, spec = driver.dispatched()
    assert (again, spec.epoch) == (peer(alive), 2)


def test_a_node_that_lost_the_router_hears_that_it_is_registered_before_it_gets_requests_again() -> None:
    """It drops requests of a router that it is not registered with."""
    driver = Driver("m0")
    driver.submit()
    pause(driver, 60.0)
    driver.sent.clear()
    driver.join("m0", session=1)
    assert [type(message) for _, message in driver.sent] == [Registered, Generate]


def test_a_node_that_lost_the_router_while_it_was_held_up_costs_no_attempt_but_only_once() -> None:
    driver = Driver("m0", limits=Limits(max_attempts=2))
    driver.submit()
    driver.dispatched()
    pause(driver, 60.0)
    driver.join("m0", session=1)  # read before any timer fires
    _, _, again = driver.dispatched()
    assert again.epoch == 2
    driver.join("m0", session=2)
    driver.dispatched()  # the second attempt that counts
    driver.join("m0", session=3)
    (ended,) = driver.delivered["r"]
    assert isinstance(ended, RequestErrored)
    assert ended.error.code == "peer_lost"
