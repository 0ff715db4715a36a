"""Clusters with a KV store: preempted requests resume from it, chats continue from it, and nothing depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.processes import NodeProcess
from support.world import Client, World

from decode_node.machine import DecodeMachine
from decode_node.preemption import Preemption
from decode_node.schedule import Schedule
from kvrelay.config.cluster_config import Role
from kvrelay.protocol.request import FinishReason

STORE = {"backend": "file", "min_read_tokens": 1, "resume": "storage"}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "num_logprobs": 2}


def preempt_often(monkeypatch: pytest.MonkeyPatch, every: int = 3) -> None:
    """Have every scheduler take the blocks of the decode that came last, every so many steps, if it decodes any.

    It must be able to come back, so one is left alone until it has been preempted and resumed.
    """
    make_room = Preemption.make_room
    steps: dict[int, int] = {}

    def with_a_victim(self: Preemption, schedule: Schedule, now: float, *, is_staging: bool) -> Any:
        steps[id(self)] = steps.get(id(self), 0) + 1
        stalled = make_room(self, schedule, now, is_staging=is_staging)
        decoding = self._requests.decoding
        if steps[id(self)] % every == 0 and decoding and not schedule.preempted:
            victim = next(reversed(decoding))
            self._release_victim(victim)
            self._requeue([victim], "growth", schedule, now)
        return stalled

    monkeypatch.setattr(Preemption, "make_room", with_a_victim)


def shape(role: str, **options: Any) -> World:
    sizes: dict[str, Any] = {"prefill": 1, "decode": 1} if role == "decode" else {"prefill": 0, "decode": 0, "mixed": 1}
    return World(3, careful=True, **sizes, **options)


def machine(world: World, name: str) -> DecodeMachine:
    found = world.nodes[name].machine
    assert isinstance(found, DecodeMachine)
    return found


def counted(world: World, *names: str) -> float:
    return sum(world.counted(name, letter) for name in names for letter in "pdm")


# ---------------------------------------------------------------- preempted requests


@pytest.mark.fault("F10")
@pytest.mark.parametrize("role", ["decode", "mixed"])
@pytest.mark.parametrize("resume", ["storage", "recompute", "auto"])
def test_preempted_every_three_steps_the_tokens_are_those_of_an_undisturbed_run(
    role: str, resume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempt_often(monkeypatch)
    with shape(role, storage={**STORE, "resume": resume}) as world:
        for number in range(6):
            world.submit(10 + number, max_tokens=30, ignore_eos=True, **(SAMPLED if number % 2 else {}))
        world.settle_clients()
        assert counted(world, "preemptions") >= 10
        assert counted(world, "kv_blocks_saved") > 0
        if resume == "recompute" and role == "decode":
            assert world.counted("kv_loads", "d") == 0


def test_blocks_that_were_overwritten_meanwhile_come_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests that do not fit together: each time one resumes, its blocks have been the other's."""
    with shape("mixed", cache={"num_blocks": 16}, storage=STORE, scheduler={"reserve_policy": "none"}) as world:
        for _ in range(2):
            world.submit(20, max_tokens=36, ignore_eos=True)
        world.settle_clients()
        assert counted(world, "preemptions") > 0
        assert counted(world, "kv_blocks_loaded") > 0
        assert counted(world, "kv_blocks_loaded") == world.store.num_read
        assert counted(world, "kv_blocks_saved") == world.store.num_written == len(world.store.blocks)
        block_bytes = world.nodes["m0"].engine.geometry.block_bytes
        assert counted(world, "kv_bytes_saved") == world.store.num_written * block_bytes


def test_only_blocks_that_the_store_lacks_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_often(monkeypatch)
    with shape("mixed", storage={**STORE, "write_policy": "on_preempt"}) as world:
        client = world.submit(40, max_tokens=24, ignore_eos=True)
        world.settle_clients()
        assert counted(world, "preemptions") >= 7
        num_tokens = len(client.prompt) + len(client.token_ids)
        assert counted(world, "kv_blocks_saved") <= num_tokens // 4
        assert len(world.store.blocks) == counted(world, "kv_blocks_saved")


def break_down(world: World) -> None:
    world.store.is_down = True


def fill_up(world: World) -> None:
    world.store.capacity = 3


def lose_much(world: World) -> None:
    world.store.losing = 0.3


def crawl(world: World) -> None:
    world.store.call_s = 2.0


def copy_slowly(world: World) -> None:
    world.store.stage_s = 0.3


@pytest.mark.fault("F22")
@pytest.mark.parametrize("fault", [break_down, fill_up, lose_much, crawl, copy_slowly])
@pytest.mark.parametrize("role", ["decode", "mixed"])
@pytest.mark.parametrize("resume", ["storage", "auto"])
def test_whatever_the_store_does_the_tokens_are_right_and_nobody_is_stuck(
    fault: Callable[[World], None], role: str, resume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempt_often(monkeypatch, 5)
    with shape(role, cache={"num_blocks": 24}, storage={**STORE, "resume": resume}) as world:
        fault(world)
        for number in range(6):
            world.submit(10 + 3 * number, max_tokens=24, ignore_eos=True)
        world.serve_all()


def test_a_store_that_recovers_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_often(monkeypatch)
    with shape("mixed", storage=STORE) as world:
        world.store.is_down = True
        world.submit(10, max_tokens=24, ignore_eos=True)
        world.settle_clients()
        assert not world.store.blocks
        world.store.is_down = False
        world.submit(10, max_tokens=24, ignore_eos=True)
        world.settle_clients()
        assert world.store.blocks


@pytest.mark.fault("F12")
def test_staging_memory_is_a_bound_and_what_is_beyond_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_often(monkeypatch)
    with shape("mixed", storage={**STORE, "staging": 1 << 16}, engine={"head_dim": 512}) as world:
        assert (1 << 16) // world.nodes["m0"].engine.geometry.block_bytes == 8
        world.store.call_s = 1.0
        for _ in range(4):
            world.submit(50, max_tokens=12, ignore_eos=True)
        world.settle_clients()
        assert counted(world, "kv_blocks_not_saved") > 0
        assert counted(world, "kv_blocks_saved") > 0


@pytest.mark.fault("F08")
@pytest.mark.parametrize("moment", ["kv_loads", "preemptions"])
def test_a_client_that_leaves_while_kv_is_on_its_way(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks stay until the store has let go of them: the World looks for that after every event."""
    preempt_often(monkeypatch)
    with shape("mixed", cache={"num_blocks": 32}, storage=STORE) as world:
        world.store.stage_s, world.store.call_s = 0.05, 0.2
        clients = [world.submit(30, max_tokens=40, ignore_eos=True) for _ in range(2)]
        world.run_until(lambda: counted(world, moment) > 0)
        for client in clients:
            world.abort(client)
        last = world.submit(60, max_tokens=8)
        world.settle_clients()
        assert [client.finish_reason for client in clients] == [FinishReason.ABORT] * 2
        assert last.error is None, "it needs blocks of those that left"


def test_a_node_that_stops_writes_what_it_has_begun_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with World(3, prefill=0, decode=0, mixed=1, storage=STORE) as world:
        world.store.call_s = 1.0
        client = world.submit(40, max_tokens=4, ignore_eos=True)
        world.run_until(lambda: client.ended)
        world.stop("m0")
        world.run_until(lambda: not world.nodes)
        assert len(world.store.blocks) == 43 // 4


def test_a_node_that_is_killed_while_it_writes_and_reads() -> None:
    with World(3, prefill=1, decode=2, careful=True, storage=STORE, cache={"num_blocks": 24}) as world:
        world.store.call_s = 0.5
        for _ in range(6):
            world.submit(30, max_tokens=30, ignore_eos=True)
        world.run_until(lambda: counted(world, "preemptions") > 0)
        world.restart("d0")
        world.serve_all()


# ---------------------------------------------------------------- moving


def test_a_preempted_request_resumes_on_another_node_that_has_room() -> None:
    with World(
        5,
        prefill=1,
        decode=2,
        careful=True,
        storage=STORE,
        cache={"num_blocks": 160},
        nodes={"d0": {"cache": {"num_blocks": 32}}},
        scheduler={"reserve_policy": "none", "watermark": 0.0},
        engine={"step_s": 0.1},
    ) as world:
        clients = [world.submit(24, max_tokens=60, ignore_eos=True, **SAMPLED) for _ in range(5)]
        world.settle_clients()
        assert world.router.machine.requests.counters.moved > 0
        assert counted(world, "kv_blocks_loaded") > 0
        for client in clients:
            assert len(client.logprobs) == len(client.token_ids) == 60


def test_moving_does_not_count_as_a_failure() -> None:
    with World(
        5,
        prefill=1,
        decode=2,
        storage=STORE,
        limits={"max_attempts": 1},
        cache={"num_blocks": 160},
        nodes={"d0": {"cache": {"num_blocks": 24}}},
        scheduler={"reserve_policy": "none", "watermark": 0.0},
        engine={"step_s": 0.1},
    ) as world:
        for _ in range(8):
            world.submit(20, max_tokens=50, ignore_eos=True)
        world.settle_clients()
        assert world.router.machine.requests.counters.moved > 0
        assert not any(client.error for client in world.clients.values())


# ---------------------------------------------------------------- chats that continue


def continue_chat(world: World, before: Client, num_new: int, **options: Any) -> Client:
    return world.submit([*before.prompt, *before.token_ids, *world.prompt(num_new)], **options)


def restart_empty(world: World, name: str) -> NodeProcess:
    """Start a node anew: its own prefix cache is gone."""
    node = world.restart(name)
    world.run_until(world.is_ready)
    return node


@pytest.mark.parametrize("role", [Role.PREFILL, Role.MIXED])
def test_the_next_turn_on_another_node_begins_where_the_last_one_ended(role: Role) -> None:
    sizes: dict[str, Any] = (
        {"prefill": 1, "decode": 1} if role is Role.PREFILL else {"prefill": 0, "decode": 0, "mixed": 1}
    )
    with World(7, careful=True, storage=STORE, **sizes) as world:
        first = world.submit(40, max_tokens=9, ignore_eos=True)
        world.settle()
        name = "p0" if role is Role.PREFILL else "m0"
        restart_empty(world, name)
        second = continue_chat(world, first, 10, max_tokens=5)
        world.settle_clients()
        assert world.counted("kv_blocks_loaded", name[0]) == 48 // 4
        assert second.num_cached_tokens == 48
        assert world.counted("prefill_tokens", name[0]) == 59 - 48


def test_a_request_that_ends_on_the_prefill_node_is_kept_too() -> None:
    with World(7, storage=STORE) as world:
        first = world.submit(40, max_tokens=1)
        world.settle()
        restart_empty(world, "p0")
        second = continue_chat(world, first, 3, max_tokens=1)
        world.settle_clients()
        assert second.num_cached_tokens == 40


def test_short_beginnings_are_not_looked_for() -> None:
    with World(7, storage={**STORE, "min_read_tokens": 32}) as world:
        world.submit(30, max_tokens=4)
        world.settle_clients()
        assert counted(world, "kv_loads") == 0
        world.submit(32, max_tokens=4)
        world.settle_clients()
        assert world.counted("kv_loads", "p") == 1


@pytest.mark.fault("F22")
@pytest.mark.parametrize("fault", [break_down, lose_much, crawl])
def test_a_read_that_fails_is_late_or_partial_costs_nothing_but_the_recompute(fault: Callable[[World], None]) -> None:
    with World(7, careful=True, storage=STORE) as world:
        chats = [world.submit(40, max_tokens=9, ignore_eos=True) for _ in range(3)]
        world.settle()
        restart_empty(world, "p0")
        fault(world)
        for chat in chats:
            continue_chat(world, chat, 10, max_tokens=5)
        world.serve_all()


def test_other_prompts_are_computed_while_one_is_read() -> None:
    with World(7, storage={**STORE, "read_timeout_s": 5.0, "timeout_s": 5.0}) as world:
        first = world.submit(40, max_tokens=2, ignore_eos=True)
        world.settle()
        restart_empty(world, "p0")
        world.store.call_s = 3.0
        slow = continue_chat(world, first, 4, max_tokens=2)
        world.run_for(0.1)
        quick = world.submit(3, max_tokens=2)
        world.settle_clients()
        assert quick.ended_s < slow.ended_s - 2
