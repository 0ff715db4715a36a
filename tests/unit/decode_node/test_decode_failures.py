"""A sequence of a step that fails on D or on a mixed node: one error, all blocks back, nothing shared of that step."""

from __future__ import annotations

from typing import Any

import pytest
from support.machines import MESSAGER, P0, ROUTER, VOCAB_SIZE, NodeDesk, sent, spec

from kvrelay.core.config import Role
from kvrelay.core.machine import StepDone
from kvrelay.core.messages.decode_to_prefill import ReservationEnded
from kvrelay.core.messages.messager_to_node import KVArrived, KVExpected
from kvrelay.core.messages.node_to_router import RequestFailed, TokensOut
from kvrelay.core.messages.prefill_to_decode import CancelReservation, HandOff, ReserveBlocks
from kvrelay.core.messages.router_to_node import Abort, Generate
from kvrelay.core.step import SampledTokens, SequenceFailed, StepPlan, StepResult
from kvstore.block_hash import BlockHasher

PROMPT = list(range(12))
HASHES = BlockHasher("model", 4).hashes(PROMPT)


def generate(desk: NodeDesk, name: str, prompt: list[int], **options: Any) -> list[Any]:
    return desk.hear(ROUTER, Generate(request=spec(name, prompt, **options)))


def reserved(desk: NodeDesk, name: str = "r") -> None:
    """Bring a request to where its KV has arrived and P has not handed it off."""
    desk.hear(P0, ReserveBlocks(request_id=name, epoch=1, block_hashes=[*HASHES], num_tokens=len(PROMPT), max_tokens=5))
    desk.hear(MESSAGER, KVExpected(request_id=name, epoch=1))
    desk.hear(MESSAGER, KVArrived(request_id=name, epoch=1, num_bytes=96))


def hand_off(desk: NodeDesk, name: str = "r", **options: Any) -> list[Any]:
    request = spec(name, options.pop("prompt", PROMPT), 5, output_token_ids=[50], **options)
    return desk.hear(P0, HandOff(request=request, num_cached_tokens=0))


@pytest.mark.parametrize("method", ["none", "naive"])
def test_one_sequence_fails_and_the_others_of_its_step_get_their_tokens(method: str) -> None:
    desk = NodeDesk(Role.MIXED, speculative={"method": method})
    for number, name in enumerate(("a", "bad", "b")):
        generate(desk, name, list(range(20 * number, 20 * number + 10)))
    while desk.plan is None or len(desk.plan.batch) < 3:
        desk.finish_step()
    actions = desk.fail_step("bad")
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert (failed.request_id, failed.error.code, failed.error.http_status) == ("bad", "engine_error", 500)
    assert failed.error.message == "ValueError: broken"
    [out] = sent(actions, TokensOut, ROUTER)
    assert {output.request_id for output in out.outputs} == {"a", "b"}
    desk.run_steps()
    assert [failure.request_id for failure in desk.sent(RequestFailed)] == ["bad"]
    desk.machine.assert_quiescent()


def test_what_the_failing_step_computed_is_not_shared_and_what_earlier_steps_did_is() -> None:
    desk = NodeDesk(Role.MIXED, scheduler={"max_num_batched_tokens": 8})
    generate(desk, "bad", PROMPT)
    desk.finish_step()
    desk.fail_step()
    assert (desk.num_used, desk.machine.kv.num_evictable) == (0, 2)
    generate(desk, "again", PROMPT)
    assert desk.plan is not None and [item.start for item in desk.plan.batch] == [8]
    desk.run_steps()
    desk.machine.assert_quiescent()


def test_a_decode_that_fails_shares_nothing_beyond_its_prompt() -> None:
    desk = NodeDesk(Role.MIXED)
    generate(desk, "bad", PROMPT, max_tokens=20)
    for _ in range(6):
        desk.finish_step()
    desk.fail_step()
    assert (desk.num_used, desk.machine.kv.num_evictable) == (0, len(HASHES))
    desk.machine.assert_quiescent()


def test_a_preempted_request_may_fail_when_it_is_resumed() -> None:
    desk = NodeDesk(Role.MIXED, cache={"num_blocks": 6, "prefix_caching": False})
    generate(desk, "a", list(range(8)), max_tokens=9)
    generate(desk, "b", list(range(20, 28)), max_tokens=9)
    while not desk.machine.scheduler.num_preempted:
        desk.finish_step()
    [victim] = list(desk.machine.scheduler.waiting)
    name = victim.spec.request_id
    while desk.plan is not None and name not in {item.sequence.spec.request_id for item in desk.plan.batch}:
        desk.finish_step()
    assert [failure.request_id for failure in sent(desk.fail_step(name), RequestFailed)] == [name]
    desk.run_steps()
    desk.machine.assert_quiescent()


def test_rejected_guesses_are_not_counted_of_a_sequence_that_fails() -> None:
    desk = NodeDesk(Role.MIXED, speculative={"method": "ngram", "ngram_min": 1, "ngram_max": 2})
    generate(desk, "bad", [1, 2, 3, 1, 2, 3, 1, 2], max_tokens=10)
    desk.finish_step(3)
    assert desk.plan is not None and desk.plan.batch[0].drafts
    plan, desk.plan = desk.plan, None
    desk.tell(StepDone(StepResult(plan.step, [SequenceFailed("the model's logits are not finite")])))
    assert desk.machine.load().counters["draft_tokens"] == 0
    desk.machine.assert_quiescent()


def take_plan(desk: NodeDesk) -> StepPlan:
    """Return the plan of the running step, which the test ends itself."""
    plan, desk.plan = desk.plan, None
    assert plan is not None
    return plan


def test_guesses_cut_short_by_an_error_count_as_rejected_and_the_next_step_begins_there() -> None:
    desk = NodeDesk(Role.MIXED, speculative={"method": "ngram", "ngram_min": 1, "ngram_max": 2})
    generate(desk, "r", [1, 2, 3, 1, 2, 3, 1, 2], max_tokens=10)
    desk.finish_step(3)
    plan = take_plan(desk)
    item = plan.batch[0]
    assert item.drafts is not None and len(item.drafts) >= 2
    # the engine stopped after one accepted guess: what follows it is not finite
    desk.tell(StepDone(StepResult(plan.step, [SampledTokens(list(item.drafts[:1]), [])])))
    assert desk.plan is not None and desk.plan.batch[0].start == item.start + 1
    desk.fail_step()
    desk.machine.assert_quiescent()


# ---------------------------------------------------------------- what P sends


def test_kv_that_has_arrived_is_shared_only_when_it_is_handed_off() -> None:
    """P may find in the step that sent it that it is not finite."""
    desk = NodeDesk(Role.DECODE)
    reserved(desk)
    assert desk.machine.kv.match(HASHES) == []
    hand_off(desk)
    assert len(desk.machine.kv.match(HASHES)) == len(HASHES)


def test_kv_whose_prompt_fails_on_p_is_never_shared() -> None:
    desk = NodeDesk(Role.DECODE)
    reserved(desk)
    desk.hear(P0, CancelReservation(request_id="r", epoch=1, reason="the model's logits are not finite"))
    assert desk.machine.kv.num_free == desk.machine.kv.num_blocks
    desk.machine.assert_quiescent()


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1 << 40])
def test_a_hand_off_with_an_unknown_token_fails_that_request_alone(token: int) -> None:
    desk = NodeDesk(Role.DECODE)
    reserved(desk)
    reserved(desk, "other")
    actions = hand_off(desk, prompt=[*PROMPT[:-1], token])
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert failed.error.code == "invalid_request_error" and f"prompt: {token}" in failed.error.message
    assert [ended.request_id for ended in sent(actions, ReservationEnded, P0)] == ["r"]
    hand_off(desk, "other")
    desk.run_steps()
    assert [failure.request_id for failure in desk.sent(RequestFailed)] == ["r"]
    desk.machine.assert_quiescent()


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1 << 40])
@pytest.mark.parametrize("field", ["prompt", "stop_token_ids", "eos_token_ids", "logit_bias"])
def test_a_request_with_an_unknown_token_fails_before_anything_is_done_for_it(field: str, token: int) -> None:
    desk = NodeDesk(Role.MIXED)
    sampling: dict[str, Any] = {} if field == "prompt" else {field: {token: 1.0} if field == "logit_bias" else [token]}
    actions = generate(desk, "bad", [*PROMPT, token] if field == "prompt" else PROMPT, sampling=sampling)
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert failed.error.code == "invalid_request_error" and f"{field}: {token}" in failed.error.message
    assert len(actions) == 1
    desk.machine.assert_quiescent()


def test_a_request_that_fails_may_be_aborted_meanwhile() -> None:
    desk = NodeDesk(Role.MIXED)
    generate(desk, "bad", PROMPT)
    desk.hear(ROUTER, Abort(request_id="bad", epoch=1))
    assert not sent(desk.fail_step(), RequestFailed)
    desk.machine.assert_quiescent()
