"""A sequence of a step that fails on D or on a mixed node: one error, all blocks back, nothing shared of that step."""

from __future__ import annotations

from typing import Any

import pytest
from support.machines import MESSAGER, P0, ROUTER, VOCAB_SIZE, NodeHarness, sent, spec

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.decode_to_prefill import ReservationEnded
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed
from kvrelay.protocol.messages.messager_to_node import KVArrived, KVExpected
from kvrelay.protocol.messages.node_to_router import RequestFailed, TokensOut
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation, HandOff, ReserveBlocks
from kvrelay.protocol.messages.router_to_node import Abort, Generate

PROMPT = list(range(12))
HASHES = BlockHasher("model", 4).hashes(PROMPT)


def generate(harness: NodeHarness, name: str, prompt: list[int], **options: Any) -> list[Any]:
    return harness.receive(ROUTER, Generate(request=spec(name, prompt, **options)))


def reserved(harness: NodeHarness, name: str = "r") -> None:
    """Bring a request to where its KV has arrived and P has not handed it off."""
    harness.receive(
        P0,
        ReserveBlocks(
            request_id=RequestId(name), epoch=1, block_hashes=[*HASHES], num_tokens=len(PROMPT), max_tokens=5
        ),
    )
    harness.receive(MESSAGER, KVExpected(request_id=RequestId(name), epoch=1))
    harness.receive(MESSAGER, KVArrived(request_id=RequestId(name), epoch=1, num_bytes=96))


def hand_off(harness: NodeHarness, name: str = "r", **options: Any) -> list[Any]:
    request = spec(name, options.pop("prompt", PROMPT), 5, output_token_ids=[50], **options)
    return harness.receive(P0, HandOff(request=request, num_cached_tokens=0))


@pytest.mark.parametrize("method", ["none", "naive"])
def test_one_sequence_fails_and_the_others_of_its_step_get_their_tokens(method: str) -> None:
    harness = NodeHarness(Role.MIXED, speculative={"method": method})
    for number, name in enumerate(("a", "bad", "b")):
        generate(harness, name, list(range(20 * number, 20 * number + 10)))
    while harness.plan is None or len(harness.plan.batch) < 3:
        harness.finish_step()
    actions = harness.fail_step("bad")
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert (failed.request_id, failed.error.code, failed.error.http_status) == ("bad", "engine_error", 500)
    assert failed.error.message == "ValueError: broken"
    [out] = sent(actions, TokensOut, ROUTER)
    assert {output.request_id for output in out.outputs} == {"a", "b"}
    harness.run_steps()
    assert [failure.request_id for failure in harness.sent(RequestFailed)] == ["bad"]
    harness.machine.assert_quiescent()


def test_what_the_failing_step_computed_is_not_shared_and_what_earlier_steps_did_is() -> None:
    harness = NodeHarness(Role.MIXED, scheduler={"max_num_batched_tokens": 8})
    generate(harness, "bad", PROMPT)
    harness.finish_step()
    harness.fail_step()
    assert (harness.num_used, harness.machine.kv.num_evictable) == (0, 2)
    generate(harness, "again", PROMPT)
    assert harness.plan is not None and [item.start for item in harness.plan.batch] == [8]
    harness.run_steps()
    harness.machine.assert_quiescent()


def test_a_decode_that_fails_shares_nothing_beyond_its_prompt() -> None:
    harness = NodeHarness(Role.MIXED)
    generate(harness, "bad", PROMPT, max_tokens=20)
    for _ in range(6):
        harness.finish_step()
    harness.fail_step()
    assert (harness.num_used, harness.machine.kv.num_evictable) == (0, len(HASHES))
    harness.machine.assert_quiescent()


def test_a_preempted_request_may_fail_when_it_is_resumed() -> None:
    harness = NodeHarness(Role.MIXED, cache={"num_blocks": 6, "prefix_caching": False})
    generate(harness, "a", list(range(8)), max_tokens=9)
    generate(harness, "b", list(range(20, 28)), max_tokens=9)
    while not sum(harness.machine.scheduler.preemption.counts.values()):
        harness.finish_step()
    [victim] = list(harness.machine.requests.waiting)
    name = victim.spec.request_id
    while name not in harness.planned():
        harness.finish_step()
    assert [failure.request_id for failure in sent(harness.fail_step(name), RequestFailed)] == [name]
    harness.run_steps()
    harness.machine.assert_quiescent()


def test_rejected_guesses_are_not_counted_of_a_sequence_that_fails() -> None:
    harness = NodeHarness(Role.MIXED, speculative={"method": "ngram", "ngram_min": 1, "ngram_max": 2})
    generate(harness, "bad", [1, 2, 3, 1, 2, 3, 1, 2], max_tokens=10)
    harness.finish_step(3)
    assert harness.plan is not None and harness.plan.batch[0].drafts
    harness.end_step([SequenceFailed("the model's logits are not finite")])
    assert harness.machine.load().counters["draft_tokens"] == 0
    harness.machine.assert_quiescent()


def test_guesses_cut_short_by_an_error_count_as_rejected_and_the_next_step_begins_there() -> None:
    harness = NodeHarness(Role.MIXED, speculative={"method": "ngram", "ngram_min": 1, "ngram_max": 2})
    generate(harness, "r", [1, 2, 3, 1, 2, 3, 1, 2], max_tokens=10)
    harness.finish_step(3)
    assert harness.plan is not None and harness.plan.batch[0].drafts is not None
    item = harness.plan.batch[0]
    assert item.drafts is not None and len(item.drafts) >= 2
    # the engine stopped after one accepted guess: what follows it is not finite
    harness.end_step([SampledTokens(list(item.drafts[:1]), [])])
    assert harness.plan is not None and harness.plan.batch[0].start == item.start + 1
    harness.fail_step()
    harness.machine.assert_quiescent()


# ---------------------------------------------------------------- what P sends


def test_kv_that_has_arrived_is_shared_only_when_it_is_handed_off() -> None:
    """P may find in the step that sent it that it is not finite."""
    harness = NodeHarness(Role.DECODE)
    reserved(harness)
    assert harness.machine.kv.match(HASHES) == []
    hand_off(harness)
    assert len(harness.machine.kv.match(HASHES)) == len(HASHES)


def test_kv_whose_prompt_fails_on_p_is_never_shared() -> None:
    harness = NodeHarness(Role.DECODE)
    reserved(harness)
    harness.receive(
        P0, CancelReservation(request_id=RequestId("r"), epoch=1, reason="the model's logits are not finite")
    )
    assert harness.machine.kv.num_free == harness.machine.kv.num_blocks
    harness.machine.assert_quiescent()


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1 << 40])
def test_a_hand_off_with_an_unknown_token_fails_that_request_alone(token: int) -> None:
    harness = NodeHarness(Role.DECODE)
    reserved(harness)
    reserved(harness, "other")
    actions = hand_off(harness, prompt=[*PROMPT[:-1], token])
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert failed.error.code == "invalid_request_error" and f"prompt: {token}" in failed.error.message
    assert [ended.request_id for ended in sent(actions, ReservationEnded, P0)] == ["r"]
    hand_off(harness, "other")
    harness.run_steps()
    assert [failure.request_id for failure in harness.sent(RequestFailed)] == ["r"]
    harness.machine.assert_quiescent()


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1 << 40])
@pytest.mark.parametrize("field", ["prompt", "stop_token_ids", "eos_token_ids", "logit_bias"])
def test_a_request_with_an_unknown_token_fails_before_anything_is_done_for_it(field: str, token: int) -> None:
    harness = NodeHarness(Role.MIXED)
    sampling: dict[str, Any] = {} if field == "prompt" else {field: {token: 1.0} if field == "logit_bias" else [token]}
    actions = generate(harness, "bad", [*PROMPT, token] if field == "prompt" else PROMPT, sampling=sampling)
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert failed.error.code == "invalid_request_error" and f"{field}: {token}" in failed.error.message
    assert len(actions) == 1
    harness.machine.assert_quiescent()


def test_a_request_that_fails_may_be_aborted_meanwhile() -> None:
    harness = NodeHarness(Role.MIXED)
    generate(harness, "bad", PROMPT)
    harness.receive(ROUTER, Abort(request_id=RequestId("bad"), epoch=1))
    assert not sent(harness.fail_step(), RequestFailed)
    harness.machine.assert_quiescent()
