"""The decode node's machine: reservations, hand-offs, leases, endings, whoever says what in whichever order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from support.machines import (
    DRAIN_S,
    LEASE_S,
    LINK,
    MESSAGER,
    P0,
    ROUTER,
    NodeHarness,
    node_config,
    registration,
    sent,
    spec,
)

from decode_node.machine import DecodeMachine
from decode_node.request import DecodeStatus
from decode_node.reservations import RETRY_AFTER_S
from kvrelay.config.cluster_config import Role
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import (
    Exit,
    PeerLost,
    Received,
    RunStep,
    SetTimer,
    Started,
    StepDone,
    StopRequested,
    TimerFired,
)
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.ids import Attempt, PeerId, RequestId
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.protocol.messages.engine import StepResult
from kvrelay.protocol.messages.messager_to_node import KVArrived, KVCancelled, KVExpected, KVFailed, MessagerReady
from kvrelay.protocol.messages.node_to_messager import CancelKV, ExpectKV, StopMessager
from kvrelay.protocol.messages.node_to_router import (
    Drained,
    Leaving,
    Register,
    RequestFailed,
    RequestTimeline,
    TokensOut,
)
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation, HandOff, RenewReservations, ReserveBlocks
from kvrelay.protocol.messages.router_to_node import (
    Abort,
    Drain,
    Generate,
    PrefillNodes,
    RegisterAgain,
    Registered,
    RegistrationRefused,
)
from kvrelay.protocol.request import FinishReason

ID: dict[str, Any] = {"request_id": "r", "epoch": 1}
PROMPT = list(range(10))
HASHES = BlockHasher("model", 4).hashes(PROMPT)


def decode_harness(**sections: Any) -> NodeHarness:
    return NodeHarness(Role.DECODE, **sections)


def mixed_harness(**sections: Any) -> NodeHarness:
    return NodeHarness(Role.MIXED, **sections)


def reserve(harness: NodeHarness, name: str = "r", num_tokens: int = 10, epoch: int = 1, peer: str = P0) -> list[Any]:
    """Ask for blocks; hashes are those of PROMPT as far as it goes."""
    message = ReserveBlocks(
        request_id=RequestId(name),
        epoch=epoch,
        block_hashes=HASHES[: num_tokens // 4],
        num_tokens=num_tokens,
        max_tokens=5,
    )
    return harness.receive(peer, message)


def test_only_prefill_nodes_that_a_router_has_named_get_reservations() -> None:
    """Before, a stranger's ReserveBlocks took the whole pool."""
    harness = decode_harness()
    harness.receive(ROUTER, PrefillNodes(peers=[PeerId(P0)]))
    for number in range(20):
        [refused] = sent(reserve(harness, f"x{number}", peer="x#1"), ReservationRefused)
        assert refused.retry_after_s == RETRY_AFTER_S
    assert harness.num_used == 0
    reserve(harness)
    assert len(harness.sent(ExpectKV)) == 1
    harness.receive(ROUTER, PrefillNodes(peers=[]))
    assert sent(reserve(harness, "late"), ReservationRefused)


def test_who_may_reserve_is_nobody_elses_word() -> None:
    harness = decode_harness()
    harness.receive(ROUTER, PrefillNodes(peers=[PeerId(P0)]))
    for peer in ("x#1", P0, MESSAGER):
        harness.receive(peer, PrefillNodes(peers=[PeerId("x#1")]))
    assert sent(reserve(harness, peer="x#1"), ReservationRefused)


def test_the_messager_is_told_whose_frames_to_take() -> None:
    harness = decode_harness()
    reserve(harness)
    assert [expect.sender for expect in harness.sent(ExpectKV)] == ["p0.messager#1"]


def expected(harness: NodeHarness, name: str = "r", epoch: int = 1) -> list[Any]:
    return harness.receive(MESSAGER, KVExpected(request_id=RequestId(name), epoch=epoch))


def arrived(harness: NodeHarness, name: str = "r", epoch: int = 1) -> list[Any]:
    return harness.receive(MESSAGER, KVArrived(request_id=RequestId(name), epoch=epoch, num_bytes=96))


def hand_off(
    harness: NodeHarness, name: str = "r", epoch: int = 1, num_tokens: int = 10, max_tokens: int = 5
) -> list[Any]:
    request = spec(name, PROMPT[:num_tokens], max_tokens, epoch=epoch, output_token_ids=[50])
    return harness.receive(P0, HandOff(request=request, num_cached_tokens=0))


def decoding(harness: NodeHarness, name: str = "r") -> None:
    """Bring a request to where it decodes."""
    reserve(harness, name)
    expected(harness, name)
    arrived(harness, name)
    hand_off(harness, name)


# ---------------------------------------------------------------- joining


def test_a_decode_node_joins_when_its_messager_is_up_and_a_mixed_node_when_it_starts() -> None:
    for role, joins in ((Role.DECODE, False), (Role.MIXED, True)):
        node = node_config(role)
        machine = DecodeMachine(node, registration(node))
        actions = machine.handle(Started(), 1.0)
        assert bool(sent(actions, Register)) is joins
        if not joins:
            actions = machine.handle(Received(MESSAGER, MessagerReady(link=LINK)), 2.0)
            assert sent(actions, Register, ROUTER)
        assert SetTimer("heartbeat", (2.0 if not joins else 1.0) + 1.0) in actions


def test_a_heartbeat_tells_the_load_once_registered_and_sets_itself_again() -> None:
    harness = decode_harness()
    assert sent(harness.pass_time(1.0), Register)
    harness.receive(ROUTER, Registered(router_incarnation="a"))
    reserve(harness)
    actions = harness.pass_time(1.0)
    [beat] = sent(actions, Heartbeat, ROUTER)
    assert beat.load is not None
    assert (beat.load.num_receiving, beat.load.used_blocks, beat.load.free_blocks) == (1, 3, 29)
    assert SetTimer("heartbeat", harness.now + 1.0) in actions
    assert sent(actions, Heartbeat, P0)


def test_a_refused_registration_ends_the_process() -> None:
    harness = decode_harness()
    assert Exit("registration refused") in harness.receive(ROUTER, RegistrationRefused(reason="block_size"))


# ---------------------------------------------------------------- reservations


def test_before_the_messager_is_up_p_is_told_to_ask_again() -> None:
    """As when the node has just been started again, and P still writes to the one that was."""
    node = node_config(Role.DECODE)
    machine = DecodeMachine(node, registration(node))
    early = ReserveBlocks(request_id=RequestId("r"), epoch=1, block_hashes=[], num_tokens=3, max_tokens=5)
    [refused] = sent(machine.handle(Received(P0, early), 1.0), ReservationRefused, P0)
    assert refused.retry_after_s is not None
    machine.assert_quiescent()


def test_p_hears_of_its_blocks_only_when_the_messager_takes_frames_for_them() -> None:
    harness = decode_harness()
    actions = reserve(harness)
    [expect] = sent(actions, ExpectKV, MESSAGER)
    assert not sent(actions, BlocksReserved)
    [reserved] = sent(expected(harness), BlocksReserved, P0)
    assert reserved.block_ids == expect.target_block_ids
    assert (len(reserved.block_ids), reserved.num_cached_blocks, reserved.lease_s) == (3, 0, LEASE_S)
    assert reserved.link == LINK


def test_what_is_in_the_prefix_cache_is_not_asked_for_again() -> None:
    harness = decode_harness()
    decoding(harness, "first")
    harness.run_steps()
    [expect] = sent(reserve(harness), ExpectKV)
    assert (expect.first_block, len(expect.target_block_ids)) == (2, 1)
    [reserved] = sent(expected(harness), BlocksReserved)
    assert (reserved.num_cached_blocks, len(reserved.block_ids)) == (2, 1)


@pytest.mark.fault("F03")
@pytest.mark.parametrize(
    ("sections", "told", "retry"),
    [
        ({"cache": {"num_blocks": 2}}, "10 tokens need 3 KV blocks", False),
        ({"cache": {"num_blocks": 4}}, "are not free", True),
        ({"scheduler": {"max_num_seqs": 1}}, "max_num_seqs", True),
    ],
)
def test_a_reservation_that_cannot_be_is_refused_with_the_reason(
    sections: dict[str, Any], told: str, retry: bool
) -> None:
    harness = decode_harness(**sections)
    reserve(harness, "other", 8)
    [refused] = sent(reserve(harness), ReservationRefused, P0)
    assert told in refused.reason
    assert (refused.retry_after_s is not None) is retry
    assert harness.machine.load().counters["reservations_refused"] == 1


def test_a_node_that_leaves_refuses_for_now() -> None:
    harness = decode_harness()
    reserve(harness, "other")
    harness.post(StopRequested())
    [refused] = sent(reserve(harness), ReservationRefused)
    assert refused.retry_after_s is not None


@pytest.mark.parametrize("num_tokens", [-1, 0, 3])
def test_a_reservation_that_makes_no_sense_is_refused_for_good(num_tokens: int) -> None:
    harness = decode_harness()
    message = ReserveBlocks(**ID, block_hashes=HASHES, num_tokens=num_tokens, max_tokens=5)
    [refused] = sent(harness.receive(P0, message), ReservationRefused)
    assert refused.retry_after_s is None
    harness.machine.assert_quiescent()


def test_reservations_do_not_keep_a_prompt_waiting_for_blocks_without_end() -> None:
    """P's requests take whatever becomes free, until the prompt that waits has been overtaken by the bound."""
    harness = decode_harness(cache={"num_blocks": 8}, scheduler={"prefill_overtake_tokens": 25})
    reserve(harness, "first")
    harness.receive(ROUTER, Generate(request=spec("long", 28)))
    assert not harness.did(RunStep)  # its 7 blocks are not free
    assert not sent(reserve(harness, "second"), ReservationRefused)
    assert not sent(reserve(harness, "small", 8), ReservationRefused)
    for name in ("first", "second", "small"):
        harness.receive(P0, CancelReservation(request_id=RequestId(name), epoch=1, reason="over"))
        if name == "first":
            [refused] = sent(reserve(harness, "third"), ReservationRefused, P0)
            assert refused.reason == "prompts that came earlier wait for blocks"
            assert refused.retry_after_s is not None
    assert harness.plan is not None
    harness.run_steps()
    harness.machine.assert_quiescent()


def test_a_reservation_asked_twice_is_one_reservation() -> None:
    harness = decode_harness()
    reserve(harness)
    assert not sent(reserve(harness), ReservationRefused)
    [first] = sent(expected(harness), BlocksReserved)
    assert sent(reserve(harness), BlocksReserved) == [first]
    assert harness.num_used == 3


def test_a_reservation_is_nobodys_but_its_senders() -> None:
    harness = decode_harness()
    reserve(harness)
    expected(harness)
    harness.receive("p9#9", CancelReservation(**ID, reason="mine now"))
    stolen = HandOff(request=spec("r", PROMPT[:10], 5, epoch=1, output_token_ids=[50]), num_cached_tokens=0)
    assert sent(harness.receive("p9#9", stolen), ReservationEnded)
    assert harness.num_used == 3
    arrived(harness)
    hand_off(harness)
    assert harness.plan is not None


@pytest.mark.fault("F14")
def test_a_new_attempt_is_another_reservation_than_the_one_before() -> None:
    harness = decode_harness()
    reserve(harness, epoch=1)
    reserve(harness, epoch=2)
    assert harness.num_used == 6
    harness.receive(P0, CancelReservation(**ID, reason="over"))
    assert harness.num_used == 3
    expected(harness, epoch=2)
    hand_off(harness, epoch=2)
    assert sent(hand_off(harness, epoch=1), ReservationEnded)
    arrived(harness, epoch=2)
    assert harness.plan is not None


# ---------------------------------------------------------------- taking over


def test_it_decodes_when_kv_and_hand_off_are_there_in_either_order() -> None:
    for first, second in ((arrived, hand_off), (hand_off, arrived)):
        harness = decode_harness()
        reserve(harness)
        expected(harness)
        first(harness)
        assert not harness.did(RunStep)
        second(harness)
        assert harness.plan is not None
        [item] = harness.plan.batch
        assert (item.start, item.num_tokens, item.samples) == (10, 1, True)
        assert harness.plan.new[0].token_ids == [*PROMPT, 50]


def test_one_message_per_step_carries_all_tokens_of_the_step() -> None:
    harness = decode_harness()
    for name in ("a", "b"):
        decoding(harness, name)
    harness.finish_step(60)
    [out] = sent(harness.finish_step(61, 71), TokensOut, ROUTER)
    assert [(output.request_id, output.index, output.token_ids) for output in out.outputs] == [
        ("a", 2, [61]),
        ("b", 1, [71]),
    ]


def test_the_last_token_tells_why_and_everything_is_given_back() -> None:
    harness = decode_harness()
    decoding(harness)
    for token in (60, 61, 62):
        [out] = sent(harness.finish_step(token), TokensOut)
        assert out.outputs[0].finish_reason is None
    actions = harness.finish_step(63)
    [out] = sent(actions, TokensOut)
    assert (out.outputs[0].index, out.outputs[0].finish_reason) == (4, FinishReason.LENGTH)
    assert [mark.name for mark in sent(actions, RequestTimeline)[0].marks][-1] == "done"
    assert harness.plan is None
    harness.machine.assert_quiescent()


@pytest.mark.fault("F06")
def test_a_hand_off_nobody_asked_for_is_answered_to_both() -> None:
    """P stops, and the router tries again."""
    harness = decode_harness()
    actions = hand_off(harness)
    assert sent(actions, ReservationEnded, P0)
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert failed.error.retryable


def test_a_hand_off_of_another_length_than_reserved_is_refused() -> None:
    harness = decode_harness()
    reserve(harness)
    expected(harness)
    actions = hand_off(harness, num_tokens=9)
    assert sent(actions, ReservationEnded, P0)
    assert sent(actions, RequestFailed, ROUTER)
    harness.machine.assert_quiescent()


@pytest.mark.fault("F23")
def test_blocks_are_matchable_only_when_their_kv_is_verified() -> None:
    harness = decode_harness()
    reserve(harness)
    expected(harness)
    hand_off(harness)
    assert harness.machine.kv.match(HASHES) == []
    arrived(harness)
    assert len(harness.machine.kv.match(HASHES)) == 2


@pytest.mark.fault("F23")
def test_failed_kv_is_told_to_p_and_router_and_never_decoded() -> None:
    harness = decode_harness()
    reserve(harness)
    expected(harness)
    hand_off(harness)
    error = ErrorInfo(code="corrupt_kv", message="layer 1", http_status=503, retryable=True)
    actions = harness.receive(MESSAGER, KVFailed(**ID, error=error))
    assert sent(actions, ReservationEnded, P0)
    assert sent(actions, RequestFailed, ROUTER) == [RequestFailed(**ID, error=error)]
    assert harness.plan is None
    assert harness.machine.kv.match(HASHES) == []
    harness.machine.assert_quiescent()


def test_prompts_that_arrived_side_by_side_keep_one_copy_of_what_they_share() -> None:
    """Neither was published when the other was reserved. Two copies would also keep each other from being evicted."""
    harness = decode_harness()
    for name in ("a", "b"):
        reserve(harness, name)
        expected(harness, name)
    assert harness.num_used == 6
    for name in ("a", "b"):
        arrived(harness, name)
        hand_off(harness, name)
    assert harness.num_used == 4  # two shared, and the last of each
    tables = [request.block_table for request in harness.machine.requests.decoding]
    assert tables[0][:2] == tables[1][:2]
    harness.run_steps()
    harness.machine.assert_quiescent()


# ---------------------------------------------------------------- who still uses the blocks


@pytest.mark.fault("F01")
def test_blocks_stay_until_the_messager_says_that_nothing_writes_to_them() -> None:
    for ending in (Abort(**ID), CancelReservation(**ID, reason="over")):
        harness = decode_harness()
        harness.messager_answers = False
        reserve(harness)
        expected(harness)
        actions = harness.receive(P0 if isinstance(ending, CancelReservation) else ROUTER, ending)
        assert sent(actions, CancelKV, MESSAGER)
        assert harness.num_used == 3
        harness.receive(MESSAGER, KVCancelled(**ID))
        harness.machine.assert_quiescent()


@pytest.mark.fault("F16")
def test_the_messager_is_reminded_of_blocks_that_it_still_holds() -> None:
    harness = decode_harness()
    harness.messager_answers = False
    reserve(harness)
    expected(harness)
    assert len(sent(harness.receive(ROUTER, Abort(**ID)), CancelKV, MESSAGER)) == 1
    assert not sent(harness.pass_time(0.5), CancelKV)  # the answer may be on its way
    assert sent(harness.pass_time(0.5), CancelKV, MESSAGER) == [CancelKV(**ID)]
    harness.receive(MESSAGER, KVCancelled(**ID))
    assert not sent(harness.pass_time(1.0), CancelKV)
    harness.machine.assert_quiescent()


@pytest.mark.fault("F16")
def test_routers_are_asked_who_may_reserve_when_a_prefill_node_is_not_known() -> None:
    """Once per heartbeat at most, whoever asks for blocks."""
    harness = decode_harness()
    harness.receive(ROUTER, Registered(router_incarnation="1"))
    harness.receive(ROUTER, PrefillNodes(peers=[]))
    assert not sent(harness.pass_time(1.0), Register)
    for number in range(3):
        reserve(harness, f"r{number}")
    assert len(sent(harness.pass_time(1.0), Register, ROUTER)) == 1
    assert not sent(harness.pass_time(1.0), Register)


def test_blocks_stay_until_the_running_step_is_over() -> None:
    harness = decode_harness()
    decoding(harness)
    harness.receive(ROUTER, Abort(**ID))
    assert harness.num_used == 3
    actions = harness.finish_step(60)
    assert not sent(actions, TokensOut)
    harness.machine.assert_quiescent()


def test_a_failed_step_ends_its_requests_with_an_error_and_gives_their_blocks_back() -> None:
    harness = decode_harness()
    decoding(harness)
    [failed] = sent(harness.fail_step(), RequestFailed, ROUTER)
    assert failed.error.code == "engine_error"
    assert "broken" in failed.error.message
    harness.machine.assert_quiescent()


def test_a_step_that_ends_twice_is_a_bug() -> None:
    harness = decode_harness()
    decoding(harness)
    harness.receive(ROUTER, Abort(**ID))
    step = harness.plan.step if harness.plan else 0
    harness.finish_step()
    with pytest.raises(LocalProtocolError, match="not in flight"):
        harness.post(StepDone(StepResult(step=step, outcomes={})))


def test_a_request_that_outgrows_the_pool_fails_after_all_its_tokens_went_out() -> None:
    harness = mixed_harness(cache={"num_blocks": 3})
    harness.receive(ROUTER, Generate(request=spec("r", 10, max_tokens=50)))
    harness.run_steps()
    tokens = sum(len(output.token_ids) for out in harness.sent(TokensOut) for output in out.outputs)
    assert tokens == 3  # KV of 12 tokens fits: 10 of the prompt, two of the output; a third was sampled after them
    [failed] = harness.sent(RequestFailed)
    assert failed.error.code == "kv_cache_too_small"
    assert "3 blocks" in failed.error.message
    harness.machine.assert_quiescent()


# ---------------------------------------------------------------- every order

EVENTS = ("arrived", "hand_off", "abort", "peer lost", "lease over", "cancel")


def perform(harness: NodeHarness, event: str) -> None:
    match event:
        case "arrived":
            # A messager says that KV has arrived only while it is expected.
            if not harness.sent(CancelKV):
                arrived(harness)
        case "hand_off":
            hand_off(harness)
        case "abort":
            harness.receive(ROUTER, Abort(**ID))
        case "peer lost":
            harness.post(PeerLost(P0, "gone"))
        case "lease over":
            harness.pass_time(LEASE_S + 0.1)
        case "cancel":
            harness.receive(P0, CancelReservation(**ID, reason="over"))


@pytest.mark.fault("F15")
@pytest.mark.parametrize("messager_answers", [True, False])
@pytest.mark.parametrize("first", EVENTS)
def test_every_order_of_what_can_befall_a_reservation(first: str, messager_answers: bool) -> None:
    for rest in itertools.permutations([event for event in EVENTS if event != first]):
        harness = decode_harness()
        harness.messager_answers = messager_answers
        reserve(harness)
        expected(harness)
        for event in (first, *rest):
            perform(harness, event)
        if not messager_answers:
            for _ in harness.sent(CancelKV):
                harness.receive(MESSAGER, KVCancelled(**ID))
        harness.run_steps()
        harness.machine.assert_quiescent()
        check_story(harness, (first, *rest))


def check_story(harness: NodeHarness, order: tuple[str, ...]) -> None:
    """Nothing is said of a request after its end; it decodes only if it came to that first."""
    told = [(output.index, output.token_ids) for out in harness.sent(TokensOut) for output in out.outputs]
    taken_over = max(order.index("arrived"), order.index("hand_off"))
    lost_before = min(order.index(event) for event in ("peer lost", "lease over", "cancel", "abort"))
    if lost_before < taken_over:
        assert told == [], order
        # Whoever is not told by its own action is told by us: the router hears of it unless it said so itself.
        failures = harness.sent(RequestFailed)
        if order[lost_before] in ("peer lost", "lease over"):
            assert failures, order
            assert all(failure.error.retryable for failure in failures)
    elif order.index("abort") < len(order) - 1 or told:
        assert len(told) <= 4


# ---------------------------------------------------------------- leases


@pytest.mark.fault("F05")
def test_a_lease_runs_out_unless_it_is_renewed() -> None:
    harness = decode_harness()
    reserve(harness)
    expected(harness)
    for _ in range(5):
        harness.receive(P0, RenewReservations(attempts=[Attempt(RequestId("r"), 1)]))
        assert not sent(harness.pass_time(LEASE_S / 2), ReservationEnded)
    harness.receive(P0, Heartbeat())  # a sign of life is no word about this reservation
    actions = harness.pass_time(LEASE_S / 2)
    assert [ended.reason for ended in sent(actions, ReservationEnded, P0)] == ["p0 let its lease run out"]
    [failed] = sent(actions, RequestFailed)
    assert failed.error.code == "transfer_timeout"
    harness.machine.assert_quiescent()


@pytest.mark.fault("F06")
def test_a_renewal_of_an_unknown_reservation_is_answered() -> None:
    harness = decode_harness()
    [ended] = sent(harness.receive(P0, RenewReservations(attempts=[Attempt(RequestId("r"), 1)])), ReservationEnded, P0)
    assert (ended.request_id, ended.epoch) == ("r", 1)


def test_nobody_renews_the_lease_of_another() -> None:
    harness = decode_harness()
    reserve(harness)
    expected(harness)
    harness.now += LEASE_S / 2
    harness.receive("p1#1", RenewReservations(attempts=[Attempt(RequestId("r"), 1)]))
    harness.receive(P0, Heartbeat())
    harness.pass_time(LEASE_S / 2)
    harness.machine.assert_quiescent()


def test_a_silent_prefill_node_is_lost_with_its_reservations_but_not_with_what_it_handed_off() -> None:
    harness = decode_harness()
    decoding(harness, "mine")
    reserve(harness, "its", 8)
    expected(harness, "its")
    [failed] = sent(harness.pass_time(5.0), RequestFailed)
    assert (failed.request_id, failed.error.code) == ("its", "peer_lost")
    assert harness.plan is not None
    harness.run_steps()
    harness.machine.assert_quiescent()


# ---------------------------------------------------------------- whole requests (mixed)


def test_a_mixed_node_serves_a_request_alone() -> None:
    harness = mixed_harness(scheduler={"max_num_batched_tokens": 4})
    harness.receive(ROUTER, Generate(request=spec("r", 10, max_tokens=3)))
    sizes = []
    while harness.plan is not None:
        sizes.append(harness.plan.num_tokens)
        harness.finish_step()
    assert sizes == [4, 4, 2, 1, 1]
    outputs = [output for out in harness.sent(TokensOut) for output in out.outputs]
    assert [output.index for output in outputs] == [0, 1, 2]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    harness.machine.assert_quiescent()


def test_a_request_that_is_sent_twice_is_served_once() -> None:
    harness = mixed_harness()
    for _ in range(2):
        harness.receive(ROUTER, Generate(request=spec()))
    harness.run_steps()
    assert len([output for out in harness.sent(TokensOut) for output in out.outputs]) == 5


def test_an_abort_ends_a_request_wherever_it_is() -> None:
    for num_steps in range(6):
        harness = mixed_harness(cache={"num_blocks": 8}, scheduler={"max_num_batched_tokens": 8})
        harness.receive(ROUTER, Generate(request=spec("a", 17, max_tokens=20)))
        harness.receive(ROUTER, Generate(request=spec("b", list(range(50, 60)), max_tokens=20)))
        for _ in range(num_steps):
            harness.finish_step()
        for name in ("b", "a"):
            harness.receive(ROUTER, Abort(request_id=RequestId(name), epoch=1))
            harness.receive(ROUTER, Abort(request_id=RequestId(name), epoch=1))
        if harness.plan is not None:
            harness.finish_step()
        harness.machine.assert_quiescent()


def test_an_abort_of_another_attempt_is_none() -> None:
    harness = mixed_harness()
    harness.receive(ROUTER, Generate(request=spec(epoch=2)))
    harness.receive(ROUTER, Abort(request_id=RequestId("r"), epoch=1))
    harness.run_steps()
    assert len(harness.sent(TokensOut)) == 5


def test_a_prompt_that_fits_no_pool_is_a_typed_error() -> None:
    harness = mixed_harness(cache={"num_blocks": 2})
    [failed] = sent(harness.receive(ROUTER, Generate(request=spec("r", 9))), RequestFailed)
    assert failed.error.code == "kv_cache_too_small"
    assert not failed.error.retryable


def test_a_second_attempt_goes_on_behind_the_tokens_that_were_delivered() -> None:
    harness = mixed_harness()
    harness.receive(ROUTER, Generate(request=spec(epoch=2, output_token_ids=[50, 51, 52])))
    assert harness.plan is not None
    assert harness.plan.num_tokens == 13
    [out] = sent(harness.finish_step(53), TokensOut)
    assert out.outputs[0].index == 3
    [out] = sent(harness.finish_step(54), TokensOut)
    assert out.outputs[0].finish_reason is FinishReason.LENGTH


def test_preempted_requests_are_told_by_no_message() -> None:
    harness = mixed_harness(cache={"num_blocks": 6})
    for name, first in (("a", 0), ("b", 50)):
        harness.receive(ROUTER, Generate(request=spec(name, list(range(first, first + 10)), max_tokens=12)))
    harness.run_steps()
    counters = harness.machine.load().counters
    assert counters["preemptions"] == counters["preemptions_growth"] > counters["preemptions_priority"] == 0
    assert not harness.sent(RequestFailed)
    indices = [output.index for out in harness.sent(TokensOut) for output in out.outputs if output.request_id == "b"]
    assert indices == list(range(12))


# ---------------------------------------------------------------- leaving


def test_a_node_leaves_when_its_last_request_has_ended() -> None:
    stops: list[Callable[[NodeHarness], list[Any]]] = [
        lambda harness: harness.post(StopRequested()),
        lambda harness: harness.receive(ROUTER, Drain()),
    ]
    for stop in stops:
        harness = decode_harness()
        decoding(harness)
        actions = stop(harness)
        assert sent(actions, Leaving, ROUTER)
        assert SetTimer("drain deadline", harness.now + DRAIN_S) in actions
        while harness.plan is not None:
            assert not harness.did(Exit)
            harness.finish_step()
        assert sent(harness.actions, Drained, ROUTER)
        assert sent(harness.actions, StopMessager, MESSAGER)
        assert harness.did(Exit) == [Exit("drained")]


def test_an_idle_node_leaves_at_once() -> None:
    assert Exit("drained") in decode_harness().post(StopRequested())
    actions = mixed_harness().post(StopRequested())
    assert Exit("drained") in actions
    assert not sent(actions, StopMessager)


@pytest.mark.parametrize("event", [StopRequested(), TimerFired("drain deadline")])
def test_requests_are_handed_back_when_it_is_told_twice_or_takes_too_long(event: object) -> None:
    harness = decode_harness()
    decoding(harness, "mine")
    reserve(harness, "its", 8)
    harness.post(StopRequested())
    actions = harness.post(event)
    assert {failed.request_id for failed in sent(actions, RequestFailed)} == {"mine", "its"}
    assert all(failed.error.retryable for failed in sent(actions, RequestFailed))
    harness.finish_step()
    assert harness.did(Exit) == [Exit("drained")]


def test_a_lost_messager_ends_the_node() -> None:
    harness = decode_harness()
    harness.messager_answers = False
    decoding(harness, "mine")
    reserve(harness, "its", 8)
    actions = harness.post(PeerLost(MESSAGER, "it exited with status -9"))
    assert {failed.request_id for failed in sent(actions, RequestFailed)} == {"mine", "its"}
    assert Exit("messager lost") in actions


@pytest.mark.parametrize("how", ["lost", "new"])
def test_a_router_that_is_gone_leaves_nothing_behind(how: str) -> None:
    harness = decode_harness()
    harness.receive(ROUTER, Registered(router_incarnation="a"))
    decoding(harness, "mine")
    reserve(harness, "its", 8)
    if how == "lost":
        harness.post(PeerLost(ROUTER, "its queue is full"))
    else:
        harness.receive(ROUTER, RegisterAgain())
        harness.receive(ROUTER, Registered(router_incarnation="b"))
    harness.finish_step()
    assert not harness.sent(RequestFailed)
    harness.machine.assert_quiescent()


def test_quiescence_tells_the_story_of_what_is_left() -> None:
    harness = decode_harness()
    reserve(harness, num_tokens=4)
    with pytest.raises(LocalProtocolError, match=r"quiescent|block"):
        harness.machine.assert_quiescent()
    assert harness.machine.requests.growing()[0].status is DecodeStatus.RESERVING
