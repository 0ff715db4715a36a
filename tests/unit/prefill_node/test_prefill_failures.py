"""A sequence of a step that fails on P: one error, all blocks back, and nothing of it for others to share."""

from __future__ import annotations

from typing import Any

import pytest
from support.machines import D0, D0_ADDRESS, LINK, MESSAGER, ROUTER, VOCAB_SIZE, NodeDesk, sent, spec

from kvrelay.core.config import Role
from kvrelay.core.messages.decode_to_prefill import BlocksReserved
from kvrelay.core.messages.node_to_messager import CloseTransfer
from kvrelay.core.messages.node_to_router import RequestFailed, RequestTimeline, TokensOut
from kvrelay.core.messages.prefill_to_decode import CancelReservation, HandOff, ReserveBlocks
from kvrelay.core.messages.router_to_node import Abort, Prefill
from kvrelay.core.request import RequestSpec

PROMPT = list(range(12))


def prefill(desk: NodeDesk, request: RequestSpec) -> list[Any]:
    return desk.hear(ROUTER, Prefill(request=request, decode_node=D0_ADDRESS))


def granted(desk: NodeDesk, name: str) -> None:
    reserved = BlocksReserved(
        request_id=name, epoch=1, block_ids=[20, 21, 22], num_cached_blocks=0, link=LINK, lease_s=8.0
    )
    desk.hear(D0, reserved)


def test_one_sequence_fails_and_the_others_of_its_step_get_their_tokens() -> None:
    desk = NodeDesk(Role.PREFILL)
    prefill(desk, spec("a", list(range(100, 110))))
    desk.finish_step()
    for name, first in (("b", 200), ("bad", 300), ("c", 400)):
        prefill(desk, spec(name, list(range(first, first + 10))))
        granted(desk, name)
    if desk.plan is None or len(desk.plan.batch) < 3:
        desk.finish_step()
    actions = desk.fail_step("bad")
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert (failed.request_id, failed.error.code, failed.error.http_status) == ("bad", "engine_error", 500)
    assert failed.error.message == "ValueError: broken"
    [cancelled] = sent(actions, CancelReservation, D0)
    assert cancelled.request_id == "bad"
    assert [close.request_id for close in sent(actions, CloseTransfer, MESSAGER)] == ["bad"]
    [out] = sent(actions, TokensOut, ROUTER)
    assert "bad" not in {output.request_id for output in out.outputs}
    assert {off.request.request_id for off in desk.sent(HandOff)} >= {output.request_id for output in out.outputs}


def test_what_the_failing_step_computed_is_not_shared_and_what_earlier_steps_did_is() -> None:
    desk = NodeDesk(Role.PREFILL, scheduler={"max_num_batched_tokens": 8})
    prefill(desk, spec("bad", PROMPT))
    desk.finish_step()
    assert desk.machine.kv.num_evictable == 0
    desk.fail_step()
    assert (desk.num_used, desk.machine.kv.num_evictable) == (0, 2)
    [reserve] = sent(prefill(desk, spec("again", PROMPT)), ReserveBlocks, D0)
    assert len(reserve.block_hashes) == 3
    assert desk.plan is not None and [item.start for item in desk.plan.batch] == [8]
    desk.hear(ROUTER, Abort(request_id="again", epoch=1))
    desk.finish_step()
    desk.machine.assert_quiescent()


def test_who_waited_for_the_blocks_of_a_sequence_that_fails_computes_them() -> None:
    desk = NodeDesk(Role.PREFILL)
    prefill(desk, spec("bad", PROMPT))
    prefill(desk, spec("same", PROMPT))
    assert desk.plan is not None and len(desk.plan.batch) == 1
    desk.fail_step()
    assert desk.plan is not None
    [item] = desk.plan.batch
    assert (item.sequence.spec.request_id, item.start) == ("same", 0)
    desk.hear(ROUTER, Abort(request_id="same", epoch=1))
    desk.finish_step()
    desk.machine.assert_quiescent()


def test_a_sequence_that_fails_after_its_client_left_is_not_told_of() -> None:
    desk = NodeDesk(Role.PREFILL)
    prefill(desk, spec("bad", PROMPT))
    desk.hear(ROUTER, Abort(request_id="bad", epoch=1))
    assert not sent(desk.fail_step(), RequestFailed)
    desk.machine.assert_quiescent()


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1 << 40, -(1 << 63)])
def test_a_prompt_with_an_unknown_token_fails_before_anything_is_done_for_it(token: int) -> None:
    desk = NodeDesk(Role.PREFILL)
    actions = prefill(desk, spec("bad", [*PROMPT, token]))
    [failed] = sent(actions, RequestFailed, ROUTER)
    assert failed.error.code == "invalid_request_error" and not failed.error.retryable
    assert f"prompt: {token} is no token id" in failed.error.message
    assert len(actions) == 1
    prefill(desk, spec("fine", PROMPT, max_tokens=1))
    assert desk.plan is not None


def test_a_request_longer_than_the_model_is_refused() -> None:
    desk = NodeDesk(Role.PREFILL, cache={"num_blocks": 4096})
    [failed] = sent(prefill(desk, spec("long", 10, max_tokens=4087)), RequestFailed, ROUTER)
    assert failed.error.code == "context_length_exceeded"
    assert not desk.sent(RequestTimeline)
