"""A sequence of a step that fails on P: one error, all blocks back, and nothing of it for others to share."""

from __future__ import annotations

from typing import Any

import pytest
from support.ids import block_ids
from support.machines import D0, D0_ADDRESS, LINK, MESSAGER, ROUTER, VOCAB_SIZE, NodeHarness, sent, spec

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved
from kvrelay.protocol.messages.node_to_messager import CloseTransfer
from kvrelay.protocol.messages.node_to_router import RequestFailed, RequestTimeline, TokensOut
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation, HandOff, ReserveBlocks
from kvrelay.protocol.messages.router_to_node import Abort, Prefill
from kvrelay.protocol.request import RequestSpec

PROMPT = list(range(12))


def prefill(harness: NodeHarness, request: RequestSpec) -> list[Any]:
    return harness.receive(ROUTER, Prefill(request=request, decode_node=D0_ADDRESS))


def granted(harness: NodeHarness, name: str) -> None:
    reserved = BlocksReserved(
        request_id=RequestId(name),
        epoch=1,
        block_ids=block_ids(20, 21, 22),
        num_cached_blocks=0,
        link=LINK,
        lease_s=8.0,
    )
    harness.receive(D0, reserved)


def test_one_sequence_fails_and_the_others_of_its_step_get_their_tokens() -> None:
    harness = NodeHarness(Role.PREFILL)
    prefill(harness, spec("a", list(range(100, 110))))
    harness.finish_step()
    for name, first in (("b", 200), ("bad", 300), ("c", 400)):
        prefill(harness, spec(name, list(range(first, first + 10))))
        granted(harness, name)
    if harness.plan is None or len(harness.plan.batch) < 3:
        harness.finish_step()
    actions = harness.fail_step("bad")
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert (failed.request_id, failed.error.code, failed.error.http_status) == ("bad", "engine_error", 500)
    assert failed.error.message == "ValueError: broken"
    [cancelled] = sent(actions, CancelReservation, D0)
    assert cancelled.request_id == "bad"
    assert [close.request_id for close in sent(actions, CloseTransfer, MESSAGER)] == ["bad"]
    [out] = sent(actions, TokensOut, ROUTER)
    assert "bad" not in {output.request_id for output in out.outputs}
    assert {off.request.request_id for off in harness.sent(HandOff)} >= {output.request_id for output in out.outputs}


@pytest.mark.fault("F23")
def test_what_the_failing_step_computed_is_not_shared_and_what_earlier_steps_did_is() -> None:
    harness = NodeHarness(Role.PREFILL, scheduler={"max_num_batched_tokens": 8})
    prefill(harness, spec("bad", PROMPT))
    harness.finish_step()
    assert harness.machine.kv.num_evictable == 0
    harness.fail_step()
    assert (harness.num_used, harness.machine.kv.num_evictable) == (0, 2)
    [reserve] = sent(prefill(harness, spec("again", PROMPT)), ReserveBlocks, D0)
    assert len(reserve.block_hashes) == 3
    assert harness.plan is not None and [item.start for item in harness.plan.batch] == [8]
    harness.receive(ROUTER, Abort(request_id=RequestId("again"), epoch=1))
    harness.finish_step()
    harness.machine.assert_quiescent()


def test_who_waited_for_the_blocks_of_a_sequence_that_fails_computes_them() -> None:
    harness = NodeHarness(Role.PREFILL)
    prefill(harness, spec("bad", PROMPT))
    prefill(harness, spec("same", PROMPT))
    assert harness.plan is not None and len(harness.plan.batch) == 1
    harness.fail_step()
    assert harness.plan is not None
    assert (harness.planned(), harness.plan.batch[0].start) == (["same"], 0)
    harness.receive(ROUTER, Abort(request_id=RequestId("same"), epoch=1))
    harness.finish_step()
    harness.machine.assert_quiescent()


def test_a_sequence_that_fails_after_its_client_left_is_not_told_of() -> None:
    harness = NodeHarness(Role.PREFILL)
    prefill(harness, spec("bad", PROMPT))
    harness.receive(ROUTER, Abort(request_id=RequestId("bad"), epoch=1))
    assert not sent(harness.fail_step(), RequestFailed)
    harness.machine.assert_quiescent()


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1 << 40, -(1 << 63)])
def test_a_prompt_with_an_unknown_token_fails_before_anything_is_done_for_it(token: int) -> None:
    harness = NodeHarness(Role.PREFILL)
    actions = prefill(harness, spec("bad", [*PROMPT, token]))
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert failed.error.code == "invalid_request_error" and not failed.error.retryable
    assert f"prompt: {token} is not a token id" in failed.error.message
    assert len(actions) == 1
    prefill(harness, spec("fine", PROMPT, max_tokens=1))
    assert harness.plan is not None


def test_a_request_longer_than_the_model_is_refused() -> None:
    harness = NodeHarness(Role.PREFILL, cache={"num_blocks": 4096})
    [failed] = sent(prefill(harness, spec("long", 10, max_tokens=4087)), RequestFailed, ROUTER)
    assert failed.error.code == "context_length_exceeded"
    assert not harness.sent(RequestTimeline)
