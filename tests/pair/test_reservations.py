"""Decode nodes that are full, refuse, or never answer; and pools so small that everybody is in everybody's way."""

from __future__ import annotations

from typing import Any

import pytest
from support.ids import block_ids
from support.world import World

from decode_node.machine import DecodeMachine
from kvrelay.protocol.request import FinishReason

NO_EOS = {"eos_every": 0}


def small(num_blocks: int) -> dict[str, dict[str, int]]:
    return {"cache": {"num_blocks": num_blocks}}


@pytest.mark.fault("F03")
def test_a_full_decode_node_refuses_and_another_takes_the_request() -> None:
    with World(decode=2, engine=NO_EOS, nodes={"d0": small(8), "d1": small(8)}) as world:
        clients = [world.submit(20, 8) for _ in range(6)]
        world.settle(5.0)
        assert world.link.sent["ReservationRefused"] > 0
        assert world.link.sent["AssignDecode"] > 0
        assert [client.error for client in clients] == [None] * 6


def test_the_only_decode_node_is_asked_again_when_it_may_have_room() -> None:
    with World(engine=NO_EOS, nodes={"d0": small(8)}) as world:
        clients = [world.submit(20, 8) for _ in range(4)]
        world.settle(5.0)
        assert world.link.sent["ReservationRefused"] > 0
        assert [client.error for client in clients] == [None] * 4
        assert world.router.machine.requests.counters.retries == 0


@pytest.mark.parametrize("length", [16, 19, 20])
def test_a_decode_node_asked_after_the_first_token_reserves_for_the_prompt(length: int) -> None:
    """The refusal comes when P has computed everything: what is reserved is for the prompt, not for that token too."""
    with World(decode=2, engine=NO_EOS) as world:
        world.link.delay("ReservationRefused", 0.1)
        node = world.nodes[world.submit(4, 2).nodes[1]]
        world.settle(5.0)
        node.machine.kv.allocate(node.machine.kv.num_blocks)  # somebody else's
        clients = [world.submit(length, 8) for _ in range(2)]
        world.settle_clients(5.0)
        assert [client.error for client in clients] == [None] * 2
        assert world.link.sent["ReservationRefused"] == 1
        assert world.router.machine.requests.counters.retries == 0
        node.machine.kv.unpin(block_ids(*range(node.machine.kv.num_blocks)))


@pytest.mark.fault("F03")
def test_a_prompt_that_fits_no_pool_is_a_typed_error_at_once() -> None:
    for name in ("p0", "d0"):
        with World(engine=NO_EOS, nodes={name: small(6)}) as world:
            client = world.submit(40, 8)
            world.settle(1.0)
            assert client.error == "kv_cache_too_small"
            assert "6" in client.ended.error.message  # type: ignore[union-attr]


def test_a_late_grant_of_the_first_node_is_not_taken_for_the_second_ones() -> None:
    with World(decode=2, engine=NO_EOS, transfer={"timeout_s": 1.0}) as world:
        world.link.delay("BlocksReserved", 1.5, nth=1)
        client = world.submit(20, 8)
        world.settle(10.0)
        assert client.error is None
        assert world.link.sent["CancelReservation"] >= 1
        assert world.router.machine.requests.counters.retries == 0


@pytest.mark.parametrize("message", ["DecodeNeeded", "AssignDecode"])
def test_a_refused_request_asks_the_router_again(message: str) -> None:
    with World(decode=2, engine=NO_EOS, nodes={"d0": small(8), "d1": small(8)}) as world:
        fault = world.link.drop(message, 1)
        clients = [world.submit(20, 8) for _ in range(6)]
        world.settle(30.0)
        assert fault.num_seen > 1
        assert [client.error for client in clients] == [None] * 6


@pytest.mark.fault("F03")
def test_a_request_that_seeks_a_decode_node_and_was_forgotten_gives_its_blocks_back() -> None:
    with World(engine=NO_EOS, nodes={"d0": small(8)}) as world:
        first, second = world.submit(20, 12), world.submit(20, 12)
        world.run_until_arrived("DecodeNeeded")
        world.link.drop("Abort")
        world.abort(second)
        world.run_until(lambda: first.ended)
        world.run_for(5.0)
        world.link.heal()
        world.settle(30.0)
        assert first.error is None and second.finish_reason is FinishReason.ABORT


def test_a_reserve_for_decodes_keeps_prompts_out_but_never_an_idle_node() -> None:
    """With the whole pool as reserve one request at a time gets in, and each does get in."""
    reserve = {"reserve_policy": "fixed_blocks", "fixed_blocks": {"blocks": 1000, "decay": 0.0}}
    with World(engine=NO_EOS, scheduler=reserve) as world:
        clients = [world.submit(10, 6) for _ in range(5)]
        most = 0

        def ended() -> bool:
            nonlocal most
            machine = world.nodes["d0"].machine
            assert isinstance(machine, DecodeMachine)
            most = max(most, machine.requests.num_holding)
            return world.all_ended()

        world.run_until(ended, 30.0)
        assert most == 1
        assert [client.finish_reason for client in clients] == [FinishReason.LENGTH] * 5


# ---------------------------------------------------------------- preemption


@pytest.mark.fault("F10", "F11")
@pytest.mark.parametrize("order", ["latest_first", "shortest_output_first"])
@pytest.mark.parametrize("requeue", ["front", "tail"])
@pytest.mark.parametrize("policy", ["none", "fixed_blocks", "sglang", "new_token_ratio"])
def test_preempted_requests_go_on_as_if_nothing_had_happened(policy: str, order: str, requeue: str) -> None:
    """Drawn tokens, penalties and logprobs included."""
    scheduler = {
        "reserve_policy": policy,
        "preemption_order": order,
        "requeue": requeue,
        "watermark": 0.0,
        "new_token_ratio": {"init": 0.05, "min": 0.0},
        "sglang": {"init": 0.05, "clip_max_new_tokens": 1},
        "fixed_blocks": {"blocks": 1},
    }
    shapes: list[tuple[dict[str, Any], str]] = [({}, "d"), ({"prefill": 0, "decode": 0, "mixed": 1}, "m")]
    for roles, letter in shapes:
        with World(**roles, engine=NO_EOS, scheduler=scheduler, nodes={f"{letter}0": small(16)}, careful=True) as world:
            clients = [
                world.submit(
                    9,
                    30,
                    temperature=1.0,
                    ignore_eos=True,
                    repetition_penalty=1.2,
                    frequency_penalty=0.3,
                    num_logprobs=0,
                )
                for _ in range(6)
            ]
            world.settle(30.0)
            assert world.counted("preemptions", letter) > 0
            assert [client.finish_reason for client in clients] == [FinishReason.LENGTH] * 6
            assert all(len(client.logprobs) == 30 for client in clients)


@pytest.mark.fault("F11")
def test_a_request_that_outgrows_the_pool_alone_ends_with_an_error_and_all_it_generated() -> None:
    with World(engine=NO_EOS, nodes={"d0": small(10)}) as world:
        client = world.submit(20, 60)
        world.settle(5.0)
        assert client.error == "kv_cache_too_small"
        assert len(client.token_ids) == 10 * 4 - 20 + 1


def test_a_request_that_fits_is_not_outgrown_by_copies_of_what_others_published() -> None:
    """Prompts that begin alike reach D together: copies of the beginning must not keep the last one from growing."""
    for seed in range(10):
        with World(seed, prefill=2, engine=NO_EOS, cache={"block_size": 1}, nodes={"d0": small(40)}) as world:
            common = world.prompt(10)
            clients = [world.submit(common + world.prompt(3), 26) for _ in range(4)]
            world.settle(30.0)
            assert [client.error for client in clients] == [None] * 4


def test_preemption_is_reported_to_the_router() -> None:
    with World(engine=NO_EOS, scheduler={"reserve_policy": "none"}, nodes={"d0": small(16)}) as world:
        for _ in range(6):
            world.submit(9, 30)
        world.settle(30.0)
        load = world.nodes["d0"].machine.load()
        assert load.counters["preemptions"] >= 1
        assert load.gauges["reserve_level"] == 0.0
