"""Two plans in flight: what is planned before the tokens are known, and what happens when they end a request."""

from __future__ import annotations

from typing import Any

import pytest
from support.processes import NodeProcess
from support.world import Client, World

from kvrelay.machine.contract import RunStep
from kvrelay.protocol.messages.engine import StepPlan

CHOOSES_PLANS_IN_FLIGHT = True
MIXED = {"prefill": 0, "decode": 0, "mixed": 1}
TWO_TOKENS = {2: 100.0, 3: 100.0}
"""A bias that leaves two tokens, so that guesses are often right."""


def two_plans(seed: int = 0, engine: dict[str, Any] | None = None, **options: Any) -> World:
    return World(seed, engine={"max_plans_in_flight": 2, **(engine or {})}, careful=True, **options)


def record(node: NodeProcess) -> list[tuple[StepPlan, bool]]:
    """Return the plans of ``node`` from now on, each with whether another was in flight."""
    plans: list[tuple[StepPlan, bool]] = []
    run = node.handlers[RunStep]

    def noted(action: RunStep) -> None:
        plans.append((action.plan, bool(node._plans)))
        run(action)

    node.handle_with(RunStep, noted)
    return plans


def held_when_ended(world: World, client: Client, node: NodeProcess) -> int:
    """Run until ``client`` has its end; return how many blocks of the node are still held then."""
    world.run_until(lambda: client.ended is not None)
    return node.machine.kv.num_referenced


def test_decodes_are_planned_before_their_newest_token_is_known() -> None:
    with two_plans(engine={"eos_every": 0}) as world:
        plans = record(world.nodes["d0"])
        for _ in range(4):
            world.submit(10, 12)
        world.settle_clients()
        awaiting = [plan for plan, ahead in plans if ahead and all(item.awaits for item in plan.batch)]
        assert len(awaiting) > len(plans) / 2
        assert max(len(plan.batch) for plan in awaiting) == 4


def test_a_prompt_is_planned_chunk_after_chunk_and_then_its_first_decode() -> None:
    with two_plans(engine={"eos_every": 0}, scheduler={"max_num_batched_tokens": 8}, **MIXED) as world:
        plans = record(world.nodes["m0"])
        world.submit(20, 3)
        world.settle_clients()
        told = [(item.start, item.num_tokens, item.awaits, ahead) for plan, ahead in plans for item in plan.batch]
        chunks = [(0, 8, False, False), (8, 8, False, True), (16, 4, False, True)]
        assert told == [*chunks, (20, 1, True, True), (21, 1, True, True)]  # the third output token is the last


def test_a_prefill_node_plans_two_steps_of_chunks_and_signals_each_layer_of_each() -> None:
    with two_plans(scheduler={"max_num_batched_tokens": 8}) as world:
        plans = record(world.nodes["p0"])
        clients = [world.submit(20, 5) for _ in range(3)]
        world.settle_clients()
        assert sum(ahead for _, ahead in plans) >= len(plans) - 2
        assert all(client.error is None for client in clients)


def test_nothing_is_planned_after_the_last_token_that_a_request_may_have() -> None:
    with two_plans(engine={"eos_every": 0}, **MIXED) as world:
        plans = record(world.nodes["m0"])
        client = world.submit(10, 6)
        world.settle_clients()
        assert sum(item.samples for plan, _ in plans for item in plan.batch) == len(client.token_ids) == 6


@pytest.mark.parametrize("roles", [{}, MIXED])
def test_a_stop_token_ends_a_request_whose_next_step_is_in_flight(roles: dict[str, int]) -> None:
    """Its blocks are held until that step is over, and what it samples is dropped."""
    with two_plans(engine={"eos_every": 0}, **roles) as world:
        node = world.nodes["m0" if roles else "d0"]
        prompt = world.prompt(10)
        stop = world.greedy_reference(prompt)[4]
        client = world.submit(prompt, 20, stop_token_ids=[stop])
        assert held_when_ended(world, client, node) > 0
        world.run_until(lambda: not node._plans)
        assert node.machine.kv.num_referenced == 0
        assert client.token_ids == client.expected and client.token_ids[-1] == stop


def test_an_abort_with_two_plans_in_flight_holds_the_blocks_until_both_are_over() -> None:
    with two_plans(engine={"eos_every": 0}, **MIXED) as world:
        node = world.nodes["m0"]
        client = world.submit(10, 30)
        world.run_until(lambda: len(client.token_ids) > 5 and len(node._plans) == 2)
        world.abort(client)
        world.run_until(lambda: len(node._plans) == 1)
        assert node.machine.kv.num_referenced > 0
        world.run_until(lambda: not node._plans)
        assert node.machine.kv.num_referenced == 0


def test_a_sequence_that_fails_fails_in_the_step_after_as_well_and_is_reported_once() -> None:
    with two_plans(engine={"eos_every": 0, "broken_token": 500}, limits={"max_attempts": 1}, **MIXED) as world:
        plans = record(world.nodes["m0"])
        client = world.submit(world.prompt(6), 20, logit_bias={500: 1000.0}, min_tokens=20)
        world.run_until(lambda: client.ended is not None)
        assert client.error == "engine_error"
        assert any(item.awaits for plan, _ in plans for item in plan.batch)


@pytest.mark.parametrize("step", range(1, 9))
def test_a_step_fails_as_a_whole_while_another_is_in_flight(step: int) -> None:
    with two_plans(engine={"eos_every": 0}, scheduler={"max_num_batched_tokens": 8}, **MIXED) as world:
        world.nodes["m0"].failing_steps = {step}
        clients = [world.submit(12, 6) for _ in range(3)]
        world.settle_clients()
        assert [client.error for client in clients] == [None] * 3
        assert world.router.machine.requests.counters.retries > 0


def test_guesses_are_in_flight_beside_chunks_of_prompts() -> None:
    speculative = {"method": "ngram", "ngram_min": 1, "ngram_max": 3, "num_speculative_tokens": 3}
    scheduler = {"max_num_batched_tokens": 16}
    with two_plans(engine={"eos_every": 0}, speculative=speculative, scheduler=scheduler, **MIXED) as world:
        plans = record(world.nodes["m0"])
        for _ in range(6):
            world.submit(50, 30, logit_bias=TWO_TOKENS, temperature=0.0)
        world.settle_clients()
        beside = [
            plan for (plan, ahead), (before, _) in zip(plans[1:], plans, strict=False) if ahead and drafts(before)
        ]
        assert beside and not any(item.awaits for plan in beside for item in plan.batch)
        assert world.counted("accepted_draft_tokens", "m") > 20


def drafts(plan: StepPlan) -> bool:
    return any(item.drafts for item in plan.batch)


def test_requests_are_preempted_and_resumed() -> None:
    cache = {"num_blocks": 16, "block_size": 2}
    with two_plans(engine={"eos_every": 0}, cache=cache, scheduler={"reserve_policy": "none"}, **MIXED) as world:
        plans = record(world.nodes["m0"])
        clients = [world.submit(6, 14) for _ in range(4)]
        world.settle_clients()
        assert world.counted("preemptions", "m") > 0
        assert sum(ahead for _, ahead in plans) > len(plans) / 3
        assert [client.error for client in clients] == [None] * 4


def test_an_urgent_request_takes_blocks_from_others_though_plans_follow_on_each_other() -> None:
    scheduler = {"enable_priority_scheduling": True, "reserve_policy": "none", "priority_aging_s": 1000.0}
    cache = {"num_blocks": 16, "block_size": 4}
    with two_plans(engine={"eos_every": 0}, cache=cache, scheduler=scheduler, **MIXED) as world:
        patient = [world.submit(8, 20, priority=5) for _ in range(2)]
        world.run_until(lambda: all(len(client.token_ids) > 2 for client in patient))
        urgent = world.submit(40, 2, priority=0)
        world.settle_clients()
        assert world.counted("preemptions_priority", "m") > 0
        assert urgent.ended_s < min(client.ended_s for client in patient)
