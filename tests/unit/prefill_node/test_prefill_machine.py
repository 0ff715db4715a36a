"""The prefill node's machine: admission, reservations, signals, hand-offs, endings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from support.ids import block_ids
from support.machines import (
    D0,
    D0_ADDRESS,
    D1,
    D1_ADDRESS,
    LINK,
    MESSAGER,
    ROUTER,
    TIMEOUT_S,
    NodeHarness,
    sent,
    spec,
)

from kvrelay.config.cluster_config import Role
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import (
    Connect,
    Disconnect,
    Exit,
    LayersComputed,
    PeerLost,
    Send,
    SetTimer,
    StopRequested,
    TimerFired,
)
from kvrelay.protocol.ids import Attempt, PeerId, RequestId
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat, NodeAddress
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.protocol.messages.messager_to_node import TransferClosed, TransferDone, TransferFailed
from kvrelay.protocol.messages.node_to_messager import (
    CachedSignal,
    CloseTransfer,
    LayerSignal,
    OpenTransfer,
    StopMessager,
)
from kvrelay.protocol.messages.node_to_router import (
    AttemptsHeld,
    DecodeNeeded,
    Drained,
    Leaving,
    RequestFailed,
    RequestTimeline,
    TokensOut,
)
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation, HandOff, RenewReservations, ReserveBlocks
from kvrelay.protocol.messages.router_to_node import Abort, AssignDecode, Drain, Prefill, RegisterAgain, Registered
from kvrelay.protocol.request import FinishReason

ID: dict[str, Any] = {"request_id": "r", "epoch": 1}


def prefill_harness(**sections: Any) -> NodeHarness:
    return NodeHarness(Role.PREFILL, **sections)


def prefill(
    harness: NodeHarness,
    name: str = "r",
    prompt: int | list[int] = 10,
    node: NodeAddress | None = D0_ADDRESS,
    **options: Any,
) -> list[Any]:
    return harness.receive(ROUTER, Prefill(request=spec(name, prompt, **options), decode_node=node))


def granted(harness: NodeHarness, peer: str = D0, name: str = "r", cached: int = 0, num_blocks: int = 3) -> list[Any]:
    message = BlocksReserved(
        request_id=RequestId(name),
        epoch=1,
        block_ids=block_ids(*range(20 + cached, 20 + num_blocks)),
        num_cached_blocks=cached,
        link=LINK,
        lease_s=8.0,
    )
    return harness.receive(peer, message)


def refused(harness: NodeHarness, peer: str = D0, retry_after_s: float | None = 0.1) -> list[Any]:
    return harness.receive(peer, ReservationRefused(**ID, reason="full", retry_after_s=retry_after_s))


def transferred(harness: NodeHarness, name: str = "r") -> list[Any]:
    return harness.receive(
        MESSAGER, TransferDone(request_id=RequestId(name), epoch=1, num_bytes=64, link="shm", layers=[])
    )


# ---------------------------------------------------------------- from prompt to hand-off


def test_a_request_from_end_to_end() -> None:
    harness = prefill_harness()
    actions = prefill(harness)
    [reserve] = sent(actions, ReserveBlocks, D0)
    assert (reserve.num_tokens, len(reserve.block_hashes), reserve.max_tokens) == (10, 2, 5)
    assert Connect(D0, D0_ADDRESS.address) in actions
    assert harness.plan is not None  # P does not wait for the answer
    [opened] = sent(granted(harness), OpenTransfer, MESSAGER)
    assert (opened.first_block, opened.target_block_ids, opened.link) == (0, [20, 21, 22], LINK)
    harness.post(LayersComputed(harness.plan.step, range(1)))
    actions = harness.finish_step(50)
    [out] = sent(actions, TokensOut, ROUTER)
    assert [(output.index, output.token_ids, output.finish_reason) for output in out.outputs] == [(0, [50], None)]
    [hand_off] = sent(actions, HandOff, D0)
    assert hand_off.request.output_token_ids == [50]
    assert harness.num_used == 3
    [timeline] = sent(transferred(harness), RequestTimeline, ROUTER)
    names = [mark.name for mark in timeline.marks]
    assert names == ["queued", "prefill", "reserved", "first_token", "hand_off", "transferred"]
    harness.machine.assert_quiescent()


def test_the_first_token_does_not_wait_for_the_reservation_but_the_hand_off_does() -> None:
    harness = prefill_harness()
    prefill(harness)
    actions = harness.finish_step(50)
    assert sent(actions, TokensOut)
    assert not sent(actions, HandOff)
    assert sent(granted(harness), HandOff, D0)


def test_a_request_for_one_token_asks_no_decode_node() -> None:
    harness = prefill_harness()
    prefill(harness, node=None, max_tokens=1)
    actions = harness.finish_step(50)
    [out] = sent(actions, TokensOut)
    assert out.outputs[0].finish_reason is FinishReason.LENGTH
    assert not harness.sent(ReserveBlocks)
    assert not harness.sent(LayerSignal)
    assert not harness.sent(CloseTransfer)
    harness.machine.assert_quiescent()


def test_a_first_token_that_ends_the_request_takes_the_reservation_back() -> None:
    for grant in (False, True):
        harness = prefill_harness()
        prefill(harness, sampling={"eos_token_ids": [50]})
        if grant:
            granted(harness)
        actions = harness.finish_step(50)
        assert sent(actions, TokensOut)[0].outputs[0].finish_reason is FinishReason.STOP
        assert sent(actions, CancelReservation, D0)
        assert not sent(actions, HandOff)
        harness.machine.assert_quiescent()


def test_a_later_attempt_goes_on_behind_what_was_delivered() -> None:
    harness = prefill_harness()
    prefill(harness, output_token_ids=[50, 51])
    [reserve] = harness.sent(ReserveBlocks)
    assert (reserve.num_tokens, reserve.max_tokens) == (12, 3)
    granted(harness)
    actions = harness.finish_step(52)
    assert sent(actions, TokensOut)[0].outputs[0].index == 2
    assert sent(actions, HandOff)[0].request.output_token_ids == [50, 51, 52]


def test_a_prompt_sent_twice_is_computed_once() -> None:
    harness = prefill_harness()
    prefill(harness)
    assert prefill(harness) == []
    assert len(harness.sent(ReserveBlocks)) == 1


def test_a_prompt_that_comes_again_after_its_end_is_not_begun_again() -> None:
    """D would wait for KV that the messager does not send twice."""
    harness = prefill_harness()
    prefill(harness)
    granted(harness)
    harness.finish_step(50)
    transferred(harness)
    assert prefill(harness) == []
    harness.machine.assert_quiescent()
    assert prefill(harness, epoch=2)


# ---------------------------------------------------------------- signals


def signalled(harness: NodeHarness) -> list[tuple[int, int, int]]:
    """Return (layer, first block, blocks) of each span."""
    return [
        (signal.layer, span.first_block, len(span.source_block_ids))
        for signal in harness.sent(LayerSignal, MESSAGER)
        for span in signal.spans
    ]


def run_layers(harness: NodeHarness) -> None:
    assert harness.plan is not None
    for layer in (0, 1):
        harness.post(LayersComputed(harness.plan.step, range(layer, layer + 1)))


def test_each_layer_signals_the_blocks_that_are_whole_and_the_last_chunk_the_rest() -> None:
    harness = prefill_harness(scheduler={"max_num_batched_tokens": 6})
    prefill(harness)
    while harness.plan is not None:
        run_layers(harness)
        harness.finish_step()
    # Chunks of 4 and 6 tokens: block 0, then blocks 1 and 2, of which the last is not full.
    assert signalled(harness) == [(0, 0, 1), (1, 0, 1), (0, 1, 2), (1, 1, 2)]


def test_chunks_within_a_block_signal_nothing_until_it_is_whole() -> None:
    harness = prefill_harness(scheduler={"max_num_batched_tokens": 3})
    prefill(harness, prompt=9)
    while harness.plan is not None:
        run_layers(harness)
        harness.finish_step()
    # Chunks of 3, 1, 3 and 2 tokens.
    assert signalled(harness) == [(0, 0, 1), (1, 0, 1), (0, 1, 2), (1, 1, 2)]


def test_blocks_from_the_prefix_cache_are_signalled_at_once() -> None:
    harness = prefill_harness()
    prefill(harness, "first", node=None, max_tokens=1)
    harness.finish_step()
    actions = prefill(harness)
    [signal] = sent(actions, CachedSignal, MESSAGER)
    assert (signal.span.first_block, len(signal.span.source_block_ids)) == (0, 2)
    run_layers(harness)
    assert signalled(harness) == [(0, 2, 1), (1, 2, 1)]


def test_requests_of_one_step_share_their_signals() -> None:
    harness = prefill_harness()
    prefill(harness, "a", node=None, max_tokens=1)  # occupies the first step
    prefill(harness, "b", list(range(50, 60)))
    prefill(harness, "c", list(range(70, 75)))
    harness.finish_step()
    run_layers(harness)
    assert [len(signal.spans) for signal in harness.sent(LayerSignal)] == [2, 2]


def test_an_aborted_request_is_signalled_no_more() -> None:
    harness = prefill_harness()
    prefill(harness)
    assert harness.plan is not None
    harness.post(LayersComputed(harness.plan.step, range(1)))
    harness.receive(ROUTER, Abort(**ID))
    harness.post(LayersComputed(harness.plan.step, range(1, 2)))
    assert [signal.layer for signal in harness.sent(LayerSignal)] == [0]


# ---------------------------------------------------------------- admission


@pytest.mark.parametrize(("order", "at_once", "then"), [("fifo", "a", "abc"), ("shortest_first", "ac", "acb")])
def test_requests_wait_for_blocks_in_order(order: str, at_once: str, then: str) -> None:
    harness = prefill_harness(cache={"num_blocks": 5}, scheduler={"prefill_order": order})
    prefill(harness, "a")
    prefill(harness, "b", list(range(50, 60)))
    prefill(harness, "c", [1])
    assert "".join(reserve.request_id for reserve in harness.sent(ReserveBlocks)) == at_once
    assert harness.machine.load().num_waiting == 3 - len(at_once)
    harness.run_steps()
    for name in at_once:
        granted(harness, name=name)
        transferred(harness, name)
    assert "".join(reserve.request_id for reserve in harness.sent(ReserveBlocks)) == then


def test_a_follow_up_of_few_tokens_goes_before_an_earlier_long_prompt() -> None:
    harness = prefill_harness(scheduler={"max_num_batched_tokens": 8})
    history = list(range(30))
    prefill(harness, "turn 1", history, max_tokens=1, node=None)
    harness.run_steps()
    prefill(harness, "other", list(range(100, 120)), max_tokens=1, node=None)
    prefill(harness, "long", list(range(200, 220)), max_tokens=1, node=None)
    prefill(harness, "turn 2", [*history, 90, 91, 92], max_tokens=1, node=None)
    order = []
    while harness.plan is not None:
        order += [harness.names[item.id] for item in harness.plan.batch if item.samples]
        harness.finish_step()
    assert order == ["turn 2", "other", "long"]
    harness.machine.assert_quiescent()


def test_a_long_prompt_asks_its_decode_node_for_blocks_when_its_turn_is_near() -> None:
    for order, asked in (("fifo", ["a", "long"]), ("shortest_first", ["a"])):
        harness = prefill_harness(scheduler={"max_num_batched_tokens": 8, "prefill_order": order})
        prefill(harness, "a", list(range(33)))
        prefill(harness, "long", list(range(100, 160)))
        for _ in range(3):
            assert [reserve.request_id for reserve in harness.sent(ReserveBlocks)] == asked
            harness.finish_step()
        assert [reserve.request_id for reserve in harness.sent(ReserveBlocks)] == ["a", "long"]


def test_heartbeats_tell_of_prompts_by_length_and_of_how_long_they_waited() -> None:
    harness = prefill_harness(scheduler={"max_num_batched_tokens": 8}, cache={"num_blocks": 200})
    prefill(harness, "a", list(range(600)), node=None)
    prefill(harness, "b", list(range(700, 770)), node=None)
    harness.pass_time(0.5)
    load = harness.machine.load()
    assert load.prompt_tokens == [70, 0, 592, 0, 0]
    assert load.gauges["longest_prompt_wait_s"] == 0.5
    assert [sum(wait.counts) for wait in load.prompt_waits] == [0, 0, 1, 0, 0]
    harness.finish_step()
    load = harness.machine.load()
    assert load.gauges["longest_prompt_wait_s"] == 0.0
    assert [wait.total_s for wait in load.prompt_waits] == [0.5, 0.0, 0.0, 0.0, 0.0]


def test_evicted_blocks_do_not_make_a_prompt_pass_for_short() -> None:
    """It was matched when it came; when its turn comes, what it had is not there any more."""
    harness = prefill_harness(cache={"num_blocks": 12}, scheduler={"max_num_batched_tokens": 8})
    history = list(range(24))
    prefill(harness, "old", history, max_tokens=1, node=None)
    harness.run_steps()
    prefill(harness, "runs", list(range(100, 140)), max_tokens=1, node=None)
    prefill(harness, "follow-up", [*history, 90], max_tokens=1, node=None)
    harness.run_steps()
    harness.machine.assert_quiescent()
    assert {output.request_id for out in harness.sent(TokensOut) for output in out.outputs} == {
        "old",
        "runs",
        "follow-up",
    }


def test_a_prompt_that_fits_no_pool_is_a_typed_error() -> None:
    harness = prefill_harness(cache={"num_blocks": 2})
    [failed] = sent(prefill(harness), RequestFailed, ROUTER)
    assert (failed.error.code, failed.error.retryable) == ("kv_cache_too_small", False)
    harness.machine.assert_quiescent()


def test_prompts_that_come_together_share_what_they_begin_with() -> None:
    harness = prefill_harness()
    common = list(range(16))
    prefill(harness, "a", [*common, 100])
    prefill(harness, "b", [*common, 200])
    harness.finish_step()
    assert harness.plan is not None
    [item] = harness.plan.batch
    assert (item.start, item.num_tokens) == (16, 1)


def test_blocks_are_matchable_as_soon_as_they_are_computed() -> None:
    harness = prefill_harness(scheduler={"max_num_batched_tokens": 4})
    prefill(harness)
    [reserve] = harness.sent(ReserveBlocks)
    for computed in (0, 1, 2):
        assert len(harness.machine.kv.match(reserve.block_hashes)) == computed
        harness.finish_step()


# ---------------------------------------------------------------- reservations refused, late, lost


def test_a_refusal_goes_to_the_router_and_its_choice_is_asked() -> None:
    harness = prefill_harness()
    prefill(harness)
    [needed] = sent(refused(harness), DecodeNeeded, ROUTER)
    assert (needed.refused_by, needed.reason, needed.retry_after_s) == (D0, "full", 0.1)
    actions = harness.receive(ROUTER, AssignDecode(**ID, decode_node=D1_ADDRESS))
    assert sent(actions, ReserveBlocks, D1)
    assert sent(granted(harness, D1), OpenTransfer)
    assert sent(harness.finish_step(), HandOff, D1)


def test_who_is_asked_after_the_first_token_is_asked_for_the_prompt_only() -> None:
    """The token itself has no KV yet: D reserves for what P sends."""
    harness = prefill_harness()
    prefill(harness, prompt=8)
    harness.finish_step()
    refused(harness)
    [reserve] = sent(harness.receive(ROUTER, AssignDecode(**ID, decode_node=D1_ADDRESS)), ReserveBlocks, D1)
    assert (reserve.num_tokens, reserve.max_tokens) == (8, 5)


@pytest.mark.fault("F03")
def test_a_node_that_can_never_take_it_ends_the_request() -> None:
    harness = prefill_harness()
    prefill(harness)
    [failed] = sent(refused(harness, retry_after_s=None), RequestFailed)
    assert failed.error.code == "kv_cache_too_small"
    harness.finish_step()
    harness.machine.assert_quiescent()


def test_no_answer_in_time_is_a_refusal() -> None:
    harness = prefill_harness()
    prefill(harness)
    harness.now += TIMEOUT_S
    actions = harness.post(TimerFired(Attempt(RequestId("r"), 1)))
    assert sent(actions, CancelReservation, D0)
    assert sent(actions, DecodeNeeded, ROUTER)


def test_a_refused_request_asks_again_while_nobody_answers() -> None:
    harness = prefill_harness()
    prefill(harness)
    [needed] = sent(refused(harness), DecodeNeeded)
    for _ in range(3):
        harness.now += TIMEOUT_S
        actions = harness.post(TimerFired(Attempt(RequestId("r"), 1)))
        assert sent(actions, DecodeNeeded) == [needed]
        assert SetTimer(Attempt(RequestId("r"), 1), harness.now + TIMEOUT_S) in actions
    harness.receive(ROUTER, Abort(**ID))
    harness.finish_step()
    harness.machine.assert_quiescent()


@pytest.mark.fault("F06")
def test_a_grant_that_comes_too_late_is_given_back() -> None:
    harness = prefill_harness()
    prefill(harness)
    harness.post(TimerFired(Attempt(RequestId("r"), 1)))
    harness.receive(ROUTER, AssignDecode(**ID, decode_node=D1_ADDRESS))
    actions = granted(harness, D0)  # the first node's; the second is asked
    assert sent(actions, CancelReservation, D0)
    assert not sent(actions, OpenTransfer)
    assert sent(granted(harness, D1), OpenTransfer)
    assert not sent(granted(harness, D1), CancelReservation)  # said twice


@pytest.mark.parametrize("answer", ["refused", "ended"])
def test_what_another_node_says_of_the_reservation_means_nothing(answer: str) -> None:
    harness = prefill_harness()
    prefill(harness)
    refused(harness, D0)
    harness.receive(ROUTER, AssignDecode(**ID, decode_node=D1_ADDRESS))
    late = (
        refused(harness, D0) if answer == "refused" else harness.receive(D0, ReservationEnded(**ID, reason="unknown"))
    )
    assert late == []
    assert sent(granted(harness, D1), OpenTransfer)


@pytest.mark.fault("F06")
def test_a_grant_of_a_request_that_is_over_is_given_back() -> None:
    harness = prefill_harness()
    prefill(harness)
    harness.receive(ROUTER, Abort(**ID))
    harness.finish_step()
    assert sent(granted(harness), CancelReservation, D0)


@pytest.mark.fault("F06")
def test_a_reservation_that_d_ended_fails_the_attempt() -> None:
    harness = prefill_harness()
    prefill(harness)
    granted(harness)
    actions = harness.receive(D0, ReservationEnded(**ID, reason="p0#1 let its lease run out"))
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert failed.error.retryable
    assert sent(actions, CloseTransfer, MESSAGER)
    assert not sent(actions, CancelReservation)
    harness.finish_step()
    harness.machine.assert_quiescent()


def test_leases_of_all_that_is_asked_or_granted_are_renewed_with_each_heartbeat() -> None:
    harness = prefill_harness()
    prefill(harness, "a")
    prefill(harness, "b", [1], node=D1_ADDRESS)
    prefill(harness, "c", [2])
    granted(harness, name="a")
    renewals = {action.peer: action.message.attempts for action in harness.pass_time(1.0) if _is_renewal(action)}
    assert renewals == {D0: [("a", 1), ("c", 1)], D1: [("b", 1)]}


def _is_renewal(action: Any) -> bool:
    return isinstance(getattr(action, "message", None), RenewReservations)


def test_a_silent_decode_node_is_lost() -> None:
    harness = prefill_harness()
    prefill(harness, "asked")
    prefill(harness, "granted", [1])
    granted(harness, name="granted", num_blocks=1)
    actions = harness.pass_time(5.0)
    assert [needed.request_id for needed in sent(actions, DecodeNeeded)] == ["asked"]
    [failed] = sent(actions, RequestFailed)
    assert (failed.request_id, failed.error.code) == ("granted", "peer_lost")
    assert Disconnect(D0) in actions


def test_signs_of_life_keep_a_decode_node() -> None:
    harness = prefill_harness()
    prefill(harness)
    for _ in range(4):
        harness.receive(D0, Heartbeat())
        assert not sent(harness.pass_time(3.0), DecodeNeeded)


def test_a_decode_node_that_comes_again_takes_the_place_of_its_earlier_incarnation() -> None:
    """It may listen at the same address: two connections to it would be taken for one."""
    harness = prefill_harness()
    prefill(harness, "old")
    again = NodeAddress(peer=PeerId("d0#2"), address=D0_ADDRESS.address)
    actions = prefill(harness, "new", [1], node=again)
    assert actions.index(Disconnect(D0)) < actions.index(Connect(PeerId("d0#2"), D0_ADDRESS.address))
    assert [needed.request_id for needed in sent(actions, DecodeNeeded)] == ["old"]


# ---------------------------------------------------------------- endings


@pytest.mark.fault("F01")
def test_an_abort_in_a_step_keeps_the_blocks_until_step_and_messager_are_done() -> None:
    for order in itertools.permutations(("step", "messager")):
        harness = prefill_harness()
        harness.messager_answers = False
        prefill(harness)
        granted(harness)
        actions = harness.receive(ROUTER, Abort(**ID))
        assert sent(actions, CancelReservation, D0)
        assert sent(actions, CloseTransfer, MESSAGER)
        for holder in order:
            assert harness.num_used == 3
            if holder == "step":
                assert not sent(harness.finish_step(), TokensOut)
            else:
                harness.receive(MESSAGER, TransferClosed(**ID))
        harness.machine.assert_quiescent()


def test_an_abort_between_chunks_is_heeded_at_once() -> None:
    harness = prefill_harness(scheduler={"max_num_batched_tokens": 4})
    prefill(harness, prompt=40)
    harness.finish_step()
    harness.receive(ROUTER, Abort(**ID))
    harness.finish_step()
    assert harness.plan is None
    harness.machine.assert_quiescent()


def test_an_abort_of_a_request_that_waits_for_blocks() -> None:
    harness = prefill_harness(cache={"num_blocks": 5})
    prefill(harness, "a")
    prefill(harness, "r", list(range(50, 60)))
    harness.receive(ROUTER, Abort(**ID))
    assert harness.machine.load().num_waiting == 0
    harness.receive(ROUTER, Abort(request_id=RequestId("a"), epoch=1))
    harness.finish_step()
    harness.machine.assert_quiescent()


def test_an_abort_of_another_attempt_is_none() -> None:
    harness = prefill_harness()
    prefill(harness)
    assert harness.receive(ROUTER, Abort(request_id=RequestId("r"), epoch=2)) == []


def test_a_failed_transfer_cancels_the_reservation_and_tells_the_router() -> None:
    error = ErrorInfo(code="corrupt_kv", message="layer 1", http_status=503, retryable=True)
    for after_first_token in (False, True):
        harness = prefill_harness()
        prefill(harness)
        granted(harness)
        if after_first_token:
            harness.finish_step()
        actions = harness.receive(MESSAGER, TransferFailed(**ID, error=error))
        assert sent(actions, RequestFailed) == [RequestFailed(**ID, error=error)]
        assert sent(actions, CancelReservation, D0)
        assert not sent(actions, CloseTransfer)  # it has ended by itself
        if not after_first_token:
            harness.finish_step()
        harness.machine.assert_quiescent()


@pytest.mark.parametrize(("code", "computed"), [("corrupt_kv", 12), ("peer_lost", 1)])
def test_a_prompt_whose_kv_arrived_corrupt_is_computed_anew(code: str, computed: int) -> None:
    """The damage may be in a block of the prefix cache, which the next attempt would send again."""
    harness = prefill_harness()
    prefill(harness, "r", 12)
    granted(harness)
    harness.finish_step()
    error = ErrorInfo(code=code, message="layer 1", http_status=503, retryable=True)
    harness.receive(MESSAGER, TransferFailed(**ID, error=error))
    prefill(harness, "again", 12)
    assert harness.plan is not None
    assert [scheduled.num_tokens for scheduled in harness.plan.batch] == [computed]


def test_a_failed_step_ends_its_requests_and_not_the_others() -> None:
    harness = prefill_harness(scheduler={"max_num_batched_tokens": 12})
    prefill(harness, "r", 12)
    prefill(harness, "other", list(range(50, 60)))
    [failed] = sent(harness.fail_step(), RequestFailed)
    assert (failed.request_id, failed.error.code) == ("r", "engine_error")
    assert harness.plan is not None
    harness.finish_step()
    granted(harness, name="other")
    transferred(harness, "other")
    harness.machine.assert_quiescent()


EVENTS = ("granted", "step", "reservation ended", "decode node lost", "abort", "transfer failed", "transfer done")


def perform(harness: NodeHarness, event: str, done: tuple[str, ...]) -> None:
    """Let ``event`` come. The messager tells of a transfer only once, after it was opened and before it was closed."""
    is_open = bool(harness.sent(OpenTransfer)) and not harness.sent(CloseTransfer)
    match event:
        case "granted":
            granted(harness)
        case "step":
            harness.run_steps()
        case "reservation ended":
            harness.receive(D0, ReservationEnded(**ID, reason="over"))
        case "decode node lost":
            harness.post(PeerLost(D0, "gone"))
        case "abort":
            harness.receive(ROUTER, Abort(**ID))
        case "transfer failed":
            if is_open:
                error = ErrorInfo(code="peer_lost", message="gone", http_status=503, retryable=True)
                harness.receive(MESSAGER, TransferFailed(**ID, error=error))
        case "transfer done":
            if is_open and "step" in done:
                transferred(harness)


@pytest.mark.fault("F15")
@pytest.mark.parametrize("messager_answers", [True, False])
@pytest.mark.parametrize("first", EVENTS)
def test_every_order_of_what_can_befall_a_prompt(first: str, messager_answers: bool) -> None:
    for rest in itertools.permutations([event for event in EVENTS if event != first]):
        order = (first, *rest)
        harness = prefill_harness()
        harness.messager_answers = messager_answers
        prefill(harness)
        for number, event in enumerate(order):
            perform(harness, event, order[:number])
        if not messager_answers:
            for _ in harness.sent(CloseTransfer):
                harness.receive(MESSAGER, TransferClosed(**ID))
        harness.run_steps()
        harness.machine.assert_quiescent()
        check_story(harness, order)


def check_story(harness: NodeHarness, order: tuple[str, ...]) -> None:
    """D's blocks are handed off or given back, and the router hears of one failure at most, none after its abort."""
    told = [action.message for action in harness.actions if isinstance(action, Send) and action.peer == ROUTER]
    assert len([message for message in told if isinstance(message, RequestFailed)]) <= 1, order
    assert len(harness.sent(CloseTransfer)) <= 1, order
    assert len(harness.sent(OpenTransfer)) <= 1, order
    assert len(harness.sent(RequestTimeline)) == 1, order
    if order[0] == "abort":
        assert [type(message) for message in told] == [RequestTimeline], order
    granted_at, over_at = order.index("granted"), order.index("abort")
    ended_by_d_at = min(order.index("reservation ended"), order.index("decode node lost"))
    is_kept_on_d = granted_at > over_at or max(granted_at, over_at) < ended_by_d_at
    assert not is_kept_on_d or harness.sent(HandOff) != [] or harness.sent(CancelReservation) != [], order


@pytest.mark.fault("F15")
def test_the_end_of_a_transfer_and_a_cancellation_may_cross() -> None:
    for late in ("done", "failed"):
        harness = prefill_harness()
        harness.messager_answers = False
        prefill(harness)
        granted(harness)
        harness.finish_step()
        harness.receive(ROUTER, Abort(**ID))
        if late == "done":
            transferred(harness)
        else:
            harness.receive(MESSAGER, TransferFailed(**ID, error=ErrorInfo(code="x", message="y")))
        assert not harness.sent(RequestFailed)
        harness.machine.assert_quiescent()
        assert harness.receive(MESSAGER, TransferClosed(**ID)) == []


# ---------------------------------------------------------------- leaving


@pytest.mark.parametrize("how", ["signal", "message"])
def test_a_node_leaves_when_its_last_request_has_ended(how: str) -> None:
    harness = prefill_harness()
    prefill(harness)
    actions = harness.post(StopRequested()) if how == "signal" else harness.receive(ROUTER, Drain())
    assert sent(actions, Leaving, ROUTER)
    [failed] = sent(prefill(harness, "late"), RequestFailed)
    assert failed.error.retryable
    granted(harness)
    harness.finish_step()
    assert not harness.did(Exit)
    actions = transferred(harness)
    assert sent(actions, Drained, ROUTER)
    assert sent(actions, StopMessager, MESSAGER)
    assert Exit("drained") in actions


@pytest.mark.parametrize("event", [StopRequested(), TimerFired("drain deadline")])
def test_requests_are_handed_back_when_it_is_told_twice_or_takes_too_long(event: object) -> None:
    harness = prefill_harness()
    prefill(harness)
    harness.post(StopRequested())
    [failed] = sent(harness.post(event), RequestFailed)
    assert failed.error.retryable
    harness.finish_step()
    assert harness.did(Exit) == [Exit("drained")]


def test_a_lost_messager_ends_the_node() -> None:
    harness = prefill_harness()
    harness.messager_answers = False
    prefill(harness)
    actions = harness.post(PeerLost(MESSAGER, "it exited with status -9"))
    assert sent(actions, RequestFailed)
    assert Exit("messager lost") in actions


@pytest.mark.parametrize("how", ["lost", "new"])
def test_a_router_that_is_gone_leaves_nothing_behind(how: str) -> None:
    harness = prefill_harness()
    harness.receive(ROUTER, Registered(router_incarnation="a"))
    prefill(harness)
    granted(harness)
    if how == "lost":
        actions = harness.post(PeerLost(ROUTER, "its queue is full"))
    else:
        harness.receive(ROUTER, RegisterAgain())
        actions = harness.receive(ROUTER, Registered(router_incarnation="b"))
    assert sent(actions, CancelReservation, D0)
    assert not sent(actions, RequestFailed)
    harness.finish_step()
    harness.machine.assert_quiescent()


def test_a_router_that_finds_it_again_is_told_what_it_holds() -> None:
    harness = prefill_harness()
    registered = Registered(router_incarnation="a", wants_attempts=True)
    assert not sent(harness.receive(ROUTER, registered), AttemptsHeld)
    prefill(harness)
    assert not sent(harness.receive(ROUTER, registered), AttemptsHeld), "it was registered"
    harness.receive(ROUTER, RegisterAgain())
    assert not sent(harness.receive(ROUTER, Registered(router_incarnation="a")), AttemptsHeld), "it could not read that"
    harness.receive(ROUTER, RegisterAgain())
    [held] = sent(harness.receive(ROUTER, registered), AttemptsHeld, ROUTER)
    [(request_id, epoch)] = held.attempts
    harness.receive(ROUTER, Abort(request_id=request_id, epoch=epoch))
    harness.finish_step()
    harness.machine.assert_quiescent()
    harness.receive(ROUTER, RegisterAgain())
    assert not sent(harness.receive(ROUTER, registered), AttemptsHeld), "it holds nothing"


def test_quiescence_tells_what_is_left() -> None:
    harness = prefill_harness()
    prefill(harness)
    with pytest.raises(LocalProtocolError, match=r"quiescent|block"):
        harness.machine.assert_quiescent()
