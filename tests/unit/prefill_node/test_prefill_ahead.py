"""A prefill node with two plans in flight."""

from __future__ import annotations

from support.machines import D0_ADDRESS, MESSAGER, ROUTER, NodeHarness, spec

from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import LayersComputed, StepFailed
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.node_to_messager import LayerSignal
from kvrelay.protocol.messages.node_to_router import RequestFailed, TokensOut
from kvrelay.protocol.messages.router_to_node import Abort, Prefill


def harness_with(*prompts: int, role: Role = Role.PREFILL) -> NodeHarness:
    """Return a node with 8 tokens a step that was sent ``prompts``."""
    harness = NodeHarness(role, plans_in_flight=2, scheduler={"max_num_batched_tokens": 8})
    for number, num_tokens in enumerate(prompts):
        tokens = [100 * number + place for place in range(num_tokens)]
        harness.receive(ROUTER, Prefill(request=spec(f"r{number}", tokens), decode_node=D0_ADDRESS))
    return harness


def planned(harness: NodeHarness) -> list[list[tuple[str, int, int]]]:
    return [[(harness.names[item.id], item.start, item.num_tokens) for item in plan.batch] for plan in harness.plans]


def test_the_next_chunk_is_planned_while_the_one_before_is_computed() -> None:
    harness = harness_with(20, 10)
    assert planned(harness) == [[("r0", 0, 8)], [("r0", 8, 8)]]
    harness.finish_step()
    assert planned(harness) == [[("r0", 8, 8)], [("r0", 16, 4), ("r1", 0, 4)]]
    harness.finish_step()
    assert planned(harness) == [[("r0", 16, 4), ("r1", 0, 4)], [("r1", 4, 6)]]
    harness.finish_step()
    assert [out.outputs[0].request_id for out in harness.sent(TokensOut)] == ["r0"]
    assert planned(harness) == [[("r1", 4, 6)]]


def test_signals_are_of_the_step_that_computed_the_layers() -> None:
    harness = harness_with(20)
    first, second = harness.plans
    harness.post(LayersComputed(first.step, range(2)))
    harness.finish_step()
    harness.post(LayersComputed(second.step, range(1)))
    told = [
        (signal.step, signal.layer, signal.num_layers, signal.spans[0].first_block)
        for signal in harness.sent(LayerSignal, MESSAGER)
    ]
    assert told == [(first.step, 0, 2, 0), (second.step, 0, 1, 2)]


def test_blocks_are_held_until_every_plan_that_has_them_is_over() -> None:
    harness = harness_with(30)
    harness.receive(ROUTER, Abort(request_id=RequestId("r0"), epoch=1))
    held = harness.num_used
    assert held == 8
    harness.finish_step()
    assert harness.num_used == held
    harness.finish_step()
    assert (harness.num_used, harness.plan) == (0, None)
    harness.machine.assert_quiescent()


def test_a_step_that_fails_ends_its_requests_once_and_the_plan_behind_it_is_dropped() -> None:
    harness = harness_with(20, 8)
    harness.post(StepFailed(harness.plans.popleft().step, "ValueError: broken"))
    [failed] = harness.sent(RequestFailed, ROUTER)
    assert (failed.request_id, failed.error.retryable) == ("r0", True)
    assert harness.machine.load().prefill_tokens_per_s == 0.0  # how fast a step fails says nothing
    harness.finish_step()
    assert [failure.request_id for failure in harness.sent(RequestFailed)] == ["r0"]
    assert planned(harness) == [[("r1", 0, 8)]]
    harness.finish_step()
    harness.machine.kv.check_invariants()
