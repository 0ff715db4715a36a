"""Nodes that check themselves: leaks of blocks, slots and sequences are found while the node is idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.ids import block_ids
from support.machines import ROUTER, NodeHarness, spec

from kvrelay.config.cluster_config import Role
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import KVStaged, KVStored, Log, StageKV, StoreKV
from kvrelay.protocol.messages.router_to_node import Generate, Prefill

STORAGE = {"backend": "memory"}


def idle_node(role: Role, mode: str) -> NodeHarness:
    """Return a node that has served one prompt."""
    harness = NodeHarness(role, cluster={"self_check": mode}, storage=STORAGE)
    request = spec(prompt=10, max_tokens=1)
    prefill = Prefill(request=request, decode_node=None)
    harness.receive(ROUTER, prefill if role is Role.PREFILL else Generate(request=request))
    harness.run_steps()
    for stage in harness.did(StageKV):
        harness.post(KVStaged(stage.key))
    for store in harness.did(StoreKV):
        harness.post(KVStored(store.key, len(store.hashes), len(store.hashes)))
    return harness


def beat(harness: NodeHarness, times: int) -> list[Log]:
    logged = [action for _ in range(times) for action in harness.pass_time(1.0) if isinstance(action, Log)]
    return [line for line in logged if line.event == "self-check failed"]


def keep_a_reference(machine: Any) -> None:
    machine.kv.allocate(1)


def lose_a_block(machine: Any) -> None:
    machine.kv._pool._ref_counts[machine.kv._pool._free.pop()] = 0


def free_a_block_twice(machine: Any) -> None:
    machine.kv._pool._free.append(machine.kv._pool._free[0])


def lose_a_slot(machine: Any) -> None:
    machine._transfers._offloader._free_slots.pop()


def keep_a_sequence(machine: Any) -> None:
    machine._endings._plans._copies["sequence"] = "the engine's copy"


def forget_a_container(machine: Any) -> None:
    machine.requests.closing["request"] = None


LEAKS: dict[Callable[[Any], None], str] = {
    keep_a_reference: "1 of 32 KV blocks are still referenced",
    lose_a_block: "is lost: neither free, nor published, nor referenced",
    free_a_block_twice: "the free list names 1 blocks more than once",
    lose_a_slot: "staging slots and 0 in use are not all",
    keep_a_sequence: "1 sequences in the engine",
    forget_a_container: "0 requests are known, 1 are in containers",
}


@pytest.mark.parametrize("role", [Role.PREFILL, Role.MIXED])
@pytest.mark.parametrize("leak", LEAKS)
def test_an_idle_node_finds_and_counts_what_leaks(role: Role, leak: Callable[[Any], None]) -> None:
    harness = idle_node(role, "report")
    assert beat(harness, 12) == []
    counters = harness.machine.load().counters
    assert (counters["self_checks"], counters["self_check_violations"]) == (1, 0)
    leak(harness.machine)
    harness.machine.kv.history.num_operations += 1  # something has happened
    (line,) = beat(harness, 20)
    assert any(LEAKS[leak] in text for text in line.fields["violations"])  # type: ignore[attr-defined]
    assert harness.machine.load().counters["self_check_violations"] > 0


def test_the_log_line_has_the_history_of_the_block() -> None:
    harness = idle_node(Role.MIXED, "report")
    (block,) = harness.machine.kv.allocate(1)
    (line,) = beat(harness, 12)
    assert line.fields["block"] == block
    assert line.fields["history"][-1].startswith("allocate at ")  # type: ignore[index]


def test_a_violation_is_fatal_in_tests() -> None:
    harness = idle_node(Role.MIXED, "fatal")
    keep_a_reference(harness.machine)
    with pytest.raises(LocalProtocolError, match="still referenced"):
        beat(harness, 12)


def test_a_node_with_requests_is_not_checked() -> None:
    harness = NodeHarness(Role.MIXED)
    harness.receive(ROUTER, Generate(request=spec(prompt=10)))
    harness.machine.kv._pool._free += block_ids(0)
    beat(harness, 12)
    assert harness.machine.load().counters["self_checks"] == 0
