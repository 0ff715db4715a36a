"""The prefill node's machine: admission, reservations, signals, hand-offs, endings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from support.machines import (
    D0,
    D0_ADDRESS,
    D1,
    D1_ADDRESS,
    LINK,
    MESSAGER,
    ROUTER,
    TIMEOUT_S,
    NodeDesk,
    sent,
    spec,
)

from kvrelay.core.config import Role
from kvrelay.core.errors import LocalProtocolError
from kvrelay.core.ids import Attempt
from kvrelay.core.machine import Connect, Disconnect, Exit, LayerComputed, PeerLost, SetTimer, StopRequested, TimerFired
from kvrelay.core.messages.base import ErrorInfo, Heartbeat, NodeAddress
from kvrelay.core.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.core.messages.messager_to_node import TransferClosed, TransferDone, TransferFailed
from kvrelay.core.messages.node_to_messager import CachedSignal, CloseTransfer, LayerSignal, OpenTransfer, StopMessager
from kvrelay.core.messages.node_to_router import (
    DecodeNeeded,
    Drained,
    Leaving,
    RequestFailed,
    RequestTimeline,
    TokensOut,
)
from kvrelay.core.messages.prefill_to_decode import CancelReservation, HandOff, RenewReservations, ReserveBlocks
from kvrelay.core.messages.router_to_node import Abort, AssignDecode, Drain, Prefill, RegisterAgain, Registered
from kvrelay.core.request import FinishReason

ID: dict[str, Any] = {"request_id": "r", "epoch": 1}


def prefill_desk(**sections: dict[str, Any]) -> NodeDesk:
    return NodeDesk(Role.PREFILL, **sections)


def prefill(
    desk: NodeDesk, name: str = "r", prompt: int | list[int] = 10, node: NodeAddress | None = D0_ADDRESS, **options: Any
) -> list[Any]:
    return desk.hear(ROUTER, Prefill(request=spec(name, prompt, **options), decode_node=node))


def granted(desk: NodeDesk, peer: str = D0, name: str = "r", cached: int = 0, num_blocks: int = 3) -> list[Any]:
    message = BlocksReserved(
        request_id=name,
        epoch=1,
        block_ids=list(range(20 + cached, 20 + num_blocks)),
        num_cached_blocks=cached,
        link=LINK,
        lease_s=8.0,
    )
    return desk.hear(peer, message)


def refused(desk: NodeDesk, peer: str = D0, retry_after_s: float | None = 0.1) -> list[Any]:
    return desk.hear(peer, ReservationRefused(**ID, reason="full", retry_after_s=retry_after_s))


def transferred(desk: NodeDesk, name: str = "r") -> list[Any]:
    return desk.hear(MESSAGER, TransferDone(request_id=name, epoch=1, num_bytes=64, link="shm", layers=[]))


# ---------------------------------------------------------------- from prompt to hand-off


def test_a_request_from_end_to_end() -> None:
    desk = prefill_desk()
    actions = prefill(desk)
    [reserve] = sent(actions, ReserveBlocks, D0)
    assert (reserve.num_tokens, len(reserve.block_hashes), reserve.max_tokens) == (10, 2, 5)
    assert Connect(D0, D0_ADDRESS.address) in actions
    assert desk.plan is not None  # P does not wait for the answer
    [opened] = sent(granted(desk), OpenTransfer, MESSAGER)
    assert (opened.first_block, opened.target_block_ids, opened.link) == (0, [20, 21, 22], LINK)
    desk.tell(LayerComputed(desk.plan.step, 0))
    actions = desk.finish_step(50)
    [out] = sent(actions, TokensOut, ROUTER)
    assert [(output.index, output.token_ids, output.finish_reason) for output in out.outputs] == [(0, [50], None)]
    [hand_off] = sent(actions, HandOff, D0)
    assert hand_off.request.output_token_ids == [50]
    assert desk.num_used == 3
    [timeline] = sent(transferred(desk), RequestTimeline, ROUTER)
    names = [mark.name for mark in timeline.marks]
    assert names == ["queued", "prefill", "reserved", "first_token", "hand_off", "transferred"]
    desk.machine.assert_quiescent()


def test_the_first_token_does_not_wait_for_the_reservation_but_the_hand_off_does() -> None:
    desk = prefill_desk()
    prefill(desk)
    actions = desk.finish_step(50)
    assert sent(actions, TokensOut)
    assert not sent(actions, HandOff)
    assert sent(granted(desk), HandOff, D0)


def test_a_request_for_one_token_asks_no_decode_node() -> None:
    desk = prefill_desk()
    prefill(desk, node=None, max_tokens=1)
    actions = desk.finish_step(50)
    [out] = sent(actions, TokensOut)
    assert out.outputs[0].finish_reason is FinishReason.LENGTH
    assert not desk.sent(ReserveBlocks)
    assert not desk.sent(LayerSignal)
    assert not desk.sent(CloseTransfer)
    desk.machine.assert_quiescent()


def test_a_first_token_that_ends_the_request_takes_the_reservation_back() -> None:
    for grant in (False, True):
        desk = prefill_desk()
        prefill(desk, sampling={"eos_token_ids": [50]})
        if grant:
            granted(desk)
        actions = desk.finish_step(50)
        assert sent(actions, TokensOut)[0].outputs[0].finish_reason is FinishReason.STOP
        assert sent(actions, CancelReservation, D0)
        assert not sent(actions, HandOff)
        desk.machine.assert_quiescent()


def test_a_later_attempt_goes_on_behind_what_was_delivered() -> None:
    desk = prefill_desk()
    prefill(desk, output_token_ids=[50, 51])
    [reserve] = desk.sent(ReserveBlocks)
    assert (reserve.num_tokens, reserve.max_tokens) == (12, 3)
    granted(desk)
    actions = desk.finish_step(52)
    assert sent(actions, TokensOut)[0].outputs[0].index == 2
    assert sent(actions, HandOff)[0].request.output_token_ids == [50, 51, 52]


def test_a_prompt_sent_twice_is_computed_once() -> None:
    desk = prefill_desk()
    prefill(desk)
    assert prefill(desk) == []
    assert len(desk.sent(ReserveBlocks)) == 1


def test_a_prompt_that_comes_again_after_its_end_is_not_begun_again() -> None:
    """D would wait for KV that the messager does not send twice."""
    desk = prefill_desk()
    prefill(desk)
    granted(desk)
    desk.finish_step(50)
    transferred(desk)
    assert prefill(desk) == []
    desk.machine.assert_quiescent()
    assert prefill(desk, epoch=2)


# ---------------------------------------------------------------- signals


def signalled(desk: NodeDesk) -> list[tuple[int, int, int]]:
    """Return (layer, first block, blocks) of each span."""
    return [
        (signal.layer, span.first_block, len(span.source_block_ids))
        for signal in desk.sent(LayerSignal, MESSAGER)
        for span in signal.spans
    ]


def run_layers(desk: NodeDesk) -> None:
    assert desk.plan is not None
    for layer in (0, 1):
        desk.tell(LayerComputed(desk.plan.step, layer))


def test_each_layer_signals_the_blocks_that_are_whole_and_the_last_chunk_the_rest() -> None:
    desk = prefill_desk(scheduler={"max_num_batched_tokens": 6})
    prefill(desk)
    while desk.plan is not None:
        run_layers(desk)
        desk.finish_step()
    # Chunks of 4 and 6 tokens: block 0, then blocks 1 and 2, of which the last is not full.
    assert signalled(desk) == [(0, 0, 1), (1, 0, 1), (0, 1, 2), (1, 1, 2)]


def test_chunks_within_a_block_signal_nothing_until_it_is_whole() -> None:
    desk = prefill_desk(scheduler={"max_num_batched_tokens": 3})
    prefill(desk, prompt=9)
    while desk.plan is not None:
        run_layers(desk)
        desk.finish_step()
    # Chunks of 3, 1, 3 and 2 tokens.
    assert signalled(desk) == [(0, 0, 1), (1, 0, 1), (0, 1, 2), (1, 1, 2)]


def test_blocks_from_the_prefix_cache_are_signalled_at_once() -> None:
    desk = prefill_desk()
    prefill(desk, "first", node=None, max_tokens=1)
    desk.finish_step()
    actions = prefill(desk)
    [signal] = sent(actions, CachedSignal, MESSAGER)
    assert (signal.span.first_block, len(signal.span.source_block_ids)) == (0, 2)
    run_layers(desk)
    assert signalled(desk) == [(0, 2, 1), (1, 2, 1)]


def test_requests_of_one_step_share_their_signals() -> None:
    desk = prefill_desk()
    prefill(desk, "a", node=None, max_tokens=1)  # occupies the first step
    prefill(desk, "b", list(range(50, 60)))
    prefill(desk, "c", list(range(70, 75)))
    desk.finish_step()
    run_layers(desk)
    assert [len(signal.spans) for signal in desk.sent(LayerSignal)] == [2, 2]


def test_an_aborted_request_is_signalled_no_more() -> None:
    desk = prefill_desk()
    prefill(desk)
    assert desk.plan is not None
    desk.tell(LayerComputed(desk.plan.step, 0))
    desk.hear(ROUTER, Abort(**ID))
    desk.tell(LayerComputed(desk.plan.step, 1))
    assert [signal.layer for signal in desk.sent(LayerSignal)] == [0]


# ---------------------------------------------------------------- admission


@pytest.mark.parametrize(("order", "at_once", "then"), [("fifo", "a", "abc"), ("shortest_first", "ac", "acb")])
def test_requests_wait_for_blocks_in_order(order: str, at_once: str, then: str) -> None:
    desk = prefill_desk(cache={"num_blocks": 5}, scheduler={"prefill_order": order})
    prefill(desk, "a")
    prefill(desk, "b", list(range(50, 60)))
    prefill(desk, "c", [1])
    assert "".join(reserve.request_id for reserve in desk.sent(ReserveBlocks)) == at_once
    assert desk.machine.load().num_waiting == 3 - len(at_once)
    desk.run_steps()
    for name in at_once:
        granted(desk, name=name)
        transferred(desk, name)
    assert "".join(reserve.request_id for reserve in desk.sent(ReserveBlocks)) == then


def test_a_follow_up_of_few_tokens_goes_before_an_earlier_long_prompt() -> None:
    desk = prefill_desk(scheduler={"max_num_batched_tokens": 8})
    history = list(range(30))
    prefill(desk, "turn 1", history, max_tokens=1, node=None)
    desk.run_steps()
    prefill(desk, "other", list(range(100, 120)), max_tokens=1, node=None)
    prefill(desk, "long", list(range(200, 220)), max_tokens=1, node=None)
    prefill(desk, "turn 2", [*history, 90, 91, 92], max_tokens=1, node=None)
    order = []
    while desk.plan is not None:
        order += [item.sequence.spec.request_id for item in desk.plan.batch if item.samples]
        desk.finish_step()
    assert order == ["turn 2", "other", "long"]
    desk.machine.assert_quiescent()


def test_a_long_prompt_asks_its_decode_node_for_blocks_when_its_turn_is_near() -> None:
    for order, asked in (("fifo", ["a", "long"]), ("shortest_first", ["a"])):
        desk = prefill_desk(scheduler={"max_num_batched_tokens": 8, "prefill_order": order})
        prefill(desk, "a", list(range(33)))
        prefill(desk, "long", list(range(100, 160)))
        for _ in range(3):
            assert [reserve.request_id for reserve in desk.sent(ReserveBlocks)] == asked
            desk.finish_step()
        assert [reserve.request_id for reserve in desk.sent(ReserveBlocks)] == ["a", "long"]


def test_heartbeats_tell_of_prompts_by_length_and_of_how_long_they_waited() -> None:
    desk = prefill_desk(scheduler={"max_num_batched_tokens": 8}, cache={"num_blocks": 200})
    prefill(desk, "a", list(range(600)), node=None)
    prefill(desk, "b", list(range(700, 770)), node=None)
    desk.pass_time(0.5)
    load = desk.machine.load()
    assert load.prompt_tokens == [70, 0, 592, 0, 0]
    assert load.gauges["longest_prompt_wait_s"] == 0.5
    assert [sum(wait.counts) for wait in load.prompt_waits] == [0, 0, 1, 0, 0]
    desk.finish_step()
    load = desk.machine.load()
    assert load.gauges["longest_prompt_wait_s"] == 0.0
    assert [wait.total_s for wait in load.prompt_waits] == [0.5, 0.0, 0.0, 0.0, 0.0]


def test_evicted_blocks_do_not_make_a_prompt_pass_for_short() -> None:
    """It was matched when it came; when its turn comes, what it had is not there any more."""
    desk = prefill_desk(cache={"num_blocks": 12}, scheduler={"max_num_batched_tokens": 8})
    history = list(range(24))
    prefill(desk, "old", history, max_tokens=1, node=None)
    desk.run_steps()
    prefill(desk, "runs", list(range(100, 140)), max_tokens=1, node=None)
    prefill(desk, "follow-up", [*history, 90], max_tokens=1, node=None)
    desk.run_steps()
    desk.machine.assert_quiescent()
    assert {output.request_id for out in desk.sent(TokensOut) for output in out.outputs} == {"old", "runs", "follow-up"}


def test_a_prompt_that_fits_no_pool_is_a_typed_error() -> None:
    desk = prefill_desk(cache={"num_blocks": 2})
    [failed] = sent(prefill(desk), RequestFailed, ROUTER)
    assert (failed.error.code, failed.error.retryable) == ("kv_cache_too_small", False)
    desk.machine.assert_quiescent()


def test_prompts_that_come_together_share_what_they_begin_with() -> None:
    desk = prefill_desk()
    common = list(range(16))
    prefill(desk, "a", [*common, 100])
    prefill(desk, "b", [*common, 200])
    desk.finish_step()
    assert desk.plan is not None
    [item] = desk.plan.batch
    assert (item.start, item.num_tokens) == (16, 1)


def test_blocks_are_matchable_as_soon_as_they_are_computed() -> None:
    desk = prefill_desk(scheduler={"max_num_batched_tokens": 4})
    prefill(desk)
    [reserve] = desk.sent(ReserveBlocks)
    for computed in (0, 1, 2):
        assert len(desk.machine.kv.match(reserve.block_hashes)) == computed
        desk.finish_step()


# ---------------------------------------------------------------- reservations refused, late, lost


def test_a_refusal_goes_to_the_router_and_its_choice_is_asked() -> None:
    desk = prefill_desk()
    prefill(desk)
    [needed] = sent(refused(desk), DecodeNeeded, ROUTER)
    assert (needed.refused_by, needed.reason, needed.retry_after_s) == (D0, "full", 0.1)
    actions = desk.hear(ROUTER, AssignDecode(**ID, decode_node=D1_ADDRESS))
    assert sent(actions, ReserveBlocks, D1)
    assert sent(granted(desk, D1), OpenTransfer)
    assert sent(desk.finish_step(), HandOff, D1)


def test_who_is_asked_after_the_first_token_is_asked_for_the_prompt_only() -> None:
    """The token itself has no KV yet: D reserves for what P sends."""
    desk = prefill_desk()
    prefill(desk, prompt=8)
    desk.finish_step()
    refused(desk)
    [reserve] = sent(desk.hear(ROUTER, AssignDecode(**ID, decode_node=D1_ADDRESS)), ReserveBlocks, D1)
    assert (reserve.num_tokens, reserve.max_tokens) == (8, 5)


def test_a_node_that_can_never_take_it_ends_the_request() -> None:
    desk = prefill_desk()
    prefill(desk)
    [failed] = sent(refused(desk, retry_after_s=None), RequestFailed)
    assert failed.error.code == "kv_cache_too_small"
    desk.finish_step()
    desk.machine.assert_quiescent()


def test_no_answer_in_time_is_a_refusal() -> None:
    desk = prefill_desk()
    prefill(desk)
    desk.now += TIMEOUT_S
    actions = desk.tell(TimerFired(Attempt("r", 1)))
    assert sent(actions, CancelReservation, D0)
    assert sent(actions, DecodeNeeded, ROUTER)


def test_a_refused_request_asks_again_while_nobody_answers() -> None:
    desk = prefill_desk()
    prefill(desk)
    [needed] = sent(refused(desk), DecodeNeeded)
    for _ in range(3):
        desk.now += TIMEOUT_S
        actions = desk.tell(TimerFired(Attempt("r", 1)))
        assert sent(actions, DecodeNeeded) == [needed]
        assert SetTimer(Attempt("r", 1), desk.now + TIMEOUT_S) in actions
    desk.hear(ROUTER, Abort(**ID))
    desk.finish_step()
    desk.machine.assert_quiescent()


def test_a_grant_that_comes_too_late_is_given_back() -> None:
    desk = prefill_desk()
    prefill(desk)
    desk.tell(TimerFired(Attempt("r", 1)))
    desk.hear(ROUTER, AssignDecode(**ID, decode_node=D1_ADDRESS))
    actions = granted(desk, D0)  # the first node's; the second is asked
    assert sent(actions, CancelReservation, D0)
    assert not sent(actions, OpenTransfer)
    assert sent(granted(desk, D1), OpenTransfer)
    assert not sent(granted(desk, D1), CancelReservation)  # said twice


@pytest.mark.parametrize("answer", ["refused", "ended"])
def test_what_another_node_says_of_the_reservation_means_nothing(answer: str) -> None:
    desk = prefill_desk()
    prefill(desk)
    refused(desk, D0)
    desk.hear(ROUTER, AssignDecode(**ID, decode_node=D1_ADDRESS))
    late = refused(desk, D0) if answer == "refused" else desk.hear(D0, ReservationEnded(**ID, reason="unknown"))
    assert late == []
    assert sent(granted(desk, D1), OpenTransfer)


def test_a_grant_of_a_request_that_is_over_is_given_back() -> None:
    desk = prefill_desk()
    prefill(desk)
    desk.hear(ROUTER, Abort(**ID))
    desk.finish_step()
    assert sent(granted(desk), CancelReservation, D0)


def test_a_reservation_that_d_ended_fails_the_attempt() -> None:
    desk = prefill_desk()
    prefill(desk)
    granted(desk)
    actions = desk.hear(D0, ReservationEnded(**ID, reason="p0#1 let its lease run out"))
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert failed.error.retryable
    assert sent(actions, CloseTransfer, MESSAGER)
    assert not sent(actions, CancelReservation)
    desk.finish_step()
    desk.machine.assert_quiescent()


def test_leases_of_all_that_is_asked_or_granted_are_renewed_with_each_heartbeat() -> None:
    desk = prefill_desk()
    prefill(desk, "a")
    prefill(desk, "b", [1], node=D1_ADDRESS)
    prefill(desk, "c", [2])
    granted(desk, name="a")
    renewals = {action.peer: action.message.attempts for action in desk.pass_time(1.0) if _is_renewal(action)}
    assert renewals == {D0: [("a", 1), ("c", 1)], D1: [("b", 1)]}


def _is_renewal(action: Any) -> bool:
    return isinstance(getattr(action, "message", None), RenewReservations)


def test_a_silent_decode_node_is_lost() -> None:
    desk = prefill_desk()
    prefill(desk, "asked")
    prefill(desk, "granted", [1])
    granted(desk, name="granted", num_blocks=1)
    actions = desk.pass_time(5.0)
    assert [needed.request_id for needed in sent(actions, DecodeNeeded)] == ["asked"]
    [failed] = sent(actions, RequestFailed)
    assert (failed.request_id, failed.error.code) == ("granted", "peer_lost")
    assert Disconnect(D0) in actions


def test_signs_of_life_keep_a_decode_node() -> None:
    desk = prefill_desk()
    prefill(desk)
    for _ in range(4):
        desk.hear(D0, Heartbeat())
        assert not sent(desk.pass_time(3.0), DecodeNeeded)


def test_a_decode_node_that_comes_again_takes_the_place_of_its_earlier_incarnation() -> None:
    """It may listen at the same address: two connections to it would be taken for one."""
    desk = prefill_desk()
    prefill(desk, "old")
    again = NodeAddress(peer="d0#2", address=D0_ADDRESS.address)
    actions = prefill(desk, "new", [1], node=again)
    assert actions.index(Disconnect(D0)) < actions.index(Connect("d0#2", D0_ADDRESS.address))
    assert [needed.request_id for needed in sent(actions, DecodeNeeded)] == ["old"]


# ---------------------------------------------------------------- endings


def test_an_abort_in_a_step_keeps_the_blocks_until_step_and_messager_are_done() -> None:
    for order in itertools.permutations(("step", "messager")):
        desk = prefill_desk()
        desk.messager_answers = False
        prefill(desk)
        granted(desk)
        actions = desk.hear(ROUTER, Abort(**ID))
        assert sent(actions, CancelReservation, D0)
        assert sent(actions, CloseTransfer, MESSAGER)
        for holder in order:
            assert desk.num_used == 3
            if holder == "step":
                assert not sent(desk.finish_step(), TokensOut)
            else:
                desk.hear(MESSAGER, TransferClosed(**ID))
        desk.machine.assert_quiescent()


def test_an_abort_between_chunks_is_heeded_at_once() -> None:
    desk = prefill_desk(scheduler={"max_num_batched_tokens": 4})
    prefill(desk, prompt=40)
    desk.finish_step()
    desk.hear(ROUTER, Abort(**ID))
    desk.finish_step()
    assert desk.plan is None
    desk.machine.assert_quiescent()


def test_an_abort_of_a_request_that_waits_for_blocks() -> None:
    desk = prefill_desk(cache={"num_blocks": 5})
    prefill(desk, "a")
    prefill(desk, "r", list(range(50, 60)))
    desk.hear(ROUTER, Abort(**ID))
    assert desk.machine.load().num_waiting == 0
    desk.hear(ROUTER, Abort(request_id="a", epoch=1))
    desk.finish_step()
    desk.machine.assert_quiescent()


def test_an_abort_of_another_attempt_is_none() -> None:
    desk = prefill_desk()
    prefill(desk)
    assert desk.hear(ROUTER, Abort(request_id="r", epoch=2)) == []


def test_a_failed_transfer_cancels_the_reservation_and_tells_the_router() -> None:
    error = ErrorInfo(code="corrupt_kv", message="layer 1", http_status=503, retryable=True)
    for after_first_token in (False, True):
        desk = prefill_desk()
        prefill(desk)
        granted(desk)
        if after_first_token:
            desk.finish_step()
        actions = desk.hear(MESSAGER, TransferFailed(**ID, error=error))
        assert sent(actions, RequestFailed) == [RequestFailed(**ID, error=error)]
        assert sent(actions, CancelReservation, D0)
        assert not sent(actions, CloseTransfer)  # it has ended by itself
        if not after_first_token:
            desk.finish_step()
        desk.machine.assert_quiescent()


def test_a_failed_step_ends_its_requests_and_not_the_others() -> None:
    desk = prefill_desk(scheduler={"max_num_batched_tokens": 12})
    prefill(desk, "r", 12)
    prefill(desk, "other", list(range(50, 60)))
    [failed] = sent(desk.fail_step(), RequestFailed)
    assert (failed.request_id, failed.error.code) == ("r", "engine_error")
    assert desk.plan is not None
    desk.finish_step()
    granted(desk, name="other")
    transferred(desk, "other")
    desk.machine.assert_quiescent()


def test_the_end_of_a_transfer_and_a_cancellation_may_cross() -> None:
    for late in ("done", "failed"):
        desk = prefill_desk()
        desk.messager_answers = False
        prefill(desk)
        granted(desk)
        desk.finish_step()
        desk.hear(ROUTER, Abort(**ID))
        if late == "done":
            transferred(desk)
        else:
            desk.hear(MESSAGER, TransferFailed(**ID, error=ErrorInfo(code="x", message="y")))
        assert not desk.sent(RequestFailed)
        desk.machine.assert_quiescent()
        assert desk.hear(MESSAGER, TransferClosed(**ID)) == []


# ---------------------------------------------------------------- leaving


@pytest.mark.parametrize("how", ["signal", "message"])
def test_a_node_leaves_when_its_last_request_has_ended(how: str) -> None:
    desk = prefill_desk()
    prefill(desk)
    actions = desk.tell(StopRequested()) if how == "signal" else desk.hear(ROUTER, Drain())
    assert sent(actions, Leaving, ROUTER)
    [failed] = sent(prefill(desk, "late"), RequestFailed)
    assert failed.error.retryable
    granted(desk)
    desk.finish_step()
    assert not desk.did(Exit)
    actions = transferred(desk)
    assert sent(actions, Drained, ROUTER)
    assert sent(actions, StopMessager, MESSAGER)
    assert Exit("drained") in actions


@pytest.mark.parametrize("event", [StopRequested(), TimerFired("drain deadline")])
def test_requests_are_handed_back_when_it_is_told_twice_or_takes_too_long(event: object) -> None:
    desk = prefill_desk()
    prefill(desk)
    desk.tell(StopRequested())
    [failed] = sent(desk.tell(event), RequestFailed)
    assert failed.error.retryable
    desk.finish_step()
    assert desk.did(Exit) == [Exit("drained")]


def test_a_lost_messager_ends_the_node() -> None:
    desk = prefill_desk()
    desk.messager_answers = False
    prefill(desk)
    actions = desk.tell(PeerLost(MESSAGER, "it exited with status -9"))
    assert sent(actions, RequestFailed)
    assert Exit("messager lost") in actions


@pytest.mark.parametrize("how", ["lost", "new"])
def test_a_router_that_is_gone_leaves_nothing_behind(how: str) -> None:
    desk = prefill_desk()
    desk.hear(ROUTER, Registered(router_incarnation="a"))
    prefill(desk)
    granted(desk)
    if how == "lost":
        actions = desk.tell(PeerLost(ROUTER, "its queue is full"))
    else:
        desk.hear(ROUTER, RegisterAgain())
        actions = desk.hear(ROUTER, Registered(router_incarnation="b"))
    assert sent(actions, CancelReservation, D0)
    assert not sent(actions, RequestFailed)
    desk.finish_step()
    desk.machine.assert_quiescent()


def test_quiescence_tells_what_is_left() -> None:
    desk = prefill_desk()
    prefill(desk)
    with pytest.raises(LocalProtocolError, match=r"quiescent|block"):
        desk.machine.assert_quiescent()
