"""A prefill node with two plans in flight."""

from __future__ import annotations

from support.machines import D0_ADDRESS, MESSAGER, ROUTER, NodeDesk, spec

from kvrelay.core.config import Role
from kvrelay.core.machine import LayersComputed, StepFailed
from kvrelay.core.messages.node_to_messager import LayerSignal
from kvrelay.core.messages.node_to_router import RequestFailed, TokensOut
from kvrelay.core.messages.router_to_node import Abort, Prefill


def desk_with(*prompts: int, role: Role = Role.PREFILL) -> NodeDesk:
    """Return a node with 8 tokens a step that was sent ``prompts``."""
    desk = NodeDesk(role, plans_in_flight=2, scheduler={"max_num_batched_tokens": 8})
    for number, num_tokens in enumerate(prompts):
        tokens = [100 * number + place for place in range(num_tokens)]
        desk.hear(ROUTER, Prefill(request=spec(f"r{number}", tokens), decode_node=D0_ADDRESS))
    return desk


def planned(desk: NodeDesk) -> list[list[tuple[str, int, int]]]:
    return [[(desk.names[item.id], item.start, item.num_tokens) for item in plan.batch] for plan in desk.plans]


def test_the_next_chunk_is_planned_while_the_one_before_is_computed() -> None:
    desk = desk_with(20, 10)
    assert planned(desk) == [[("r0", 0, 8)], [("r0", 8, 8)]]
    desk.finish_step()
    assert planned(desk) == [[("r0", 8, 8)], [("r0", 16, 4), ("r1", 0, 4)]]
    desk.finish_step()
    assert planned(desk) == [[("r0", 16, 4), ("r1", 0, 4)], [("r1", 4, 6)]]
    desk.finish_step()
    assert [out.outputs[0].request_id for out in desk.sent(TokensOut)] == ["r0"]
    assert planned(desk) == [[("r1", 4, 6)]]


def test_signals_are_of_the_step_that_computed_the_layers() -> None:
    desk = desk_with(20)
    first, second = desk.plans
    desk.tell(LayersComputed(first.step, range(2)))
    desk.finish_step()
    desk.tell(LayersComputed(second.step, range(1)))
    told = [
        (signal.step, signal.layer, signal.num_layers, signal.spans[0].first_block)
        for signal in desk.sent(LayerSignal, MESSAGER)
    ]
    assert told == [(first.step, 0, 2, 0), (second.step, 0, 1, 2)]


def test_blocks_are_held_until_every_plan_that_has_them_is_over() -> None:
    desk = desk_with(30)
    desk.hear(ROUTER, Abort(request_id="r0", epoch=1))
    held = desk.num_used
    assert held == 8
    desk.finish_step()
    assert desk.num_used == held
    desk.finish_step()
    assert (desk.num_used, desk.plan) == (0, None)
    desk.machine.assert_quiescent()


def test_a_step_that_fails_ends_its_requests_once_and_the_plan_behind_it_is_dropped() -> None:
    desk = desk_with(20, 8)
    desk.tell(StepFailed(desk.plans.popleft().step, "ValueError: broken"))
    [failed] = desk.sent(RequestFailed, ROUTER)
    assert (failed.request_id, failed.error.retryable) == ("r0", True)
    desk.finish_step()
    assert [failure.request_id for failure in desk.sent(RequestFailed)] == ["r0"]
    assert planned(desk) == [[("r1", 0, 8)]]
    desk.finish_step()
    desk.machine.kv.check_invariants()
