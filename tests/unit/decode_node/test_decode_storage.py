"""A decode node and its store: what is held while KV is on its way, who waits for it, and who does not."""

from __future__ import annotations

from typing import Any

from support.machines import ROUTER, NodeHarness, sent, spec

from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import Exit, KVLoaded, KVStaged, KVStored, LoadKV, StageKV, StopRequested, StoreKV
from kvrelay.protocol.ids import Attempt, RequestId
from kvrelay.protocol.messages.node_to_router import RequestPreempted
from kvrelay.protocol.messages.router_to_node import Abort, Generate

STORE = {"backend": "file", "min_read_tokens": 1, "resume": "auto"}
WRITES_ONLY = {**STORE, "min_read_tokens": 1000, "write_policy": "on_preempt"}


def harness_with(store: dict[str, Any], **sections: Any) -> NodeHarness:
    return NodeHarness(Role.MIXED, storage=store, **sections)


def generate(harness: NodeHarness, name: str, num_tokens: int, *, same: bool = False) -> list[Any]:
    """Ask for many tokens after a prompt of its own, or after one that is the same for all."""
    first = 1000 if same else 100 * ord(name)
    return harness.receive(ROUTER, Generate(request=spec(name, list(range(first, first + num_tokens)), 100)))


def abort(harness: NodeHarness, name: str) -> list[Any]:
    return harness.receive(ROUTER, Abort(request_id=RequestId(name), epoch=1))


def scheduled(harness: NodeHarness) -> list[str]:
    """Return the names of those in the step that runs."""
    assert harness.plan is not None
    return harness.planned()


# ---------------------------------------------------------------- in


def test_a_client_leaves_while_the_store_writes_to_the_blocks() -> None:
    harness = harness_with(STORE)
    generate(harness, "a", 10)
    [load] = harness.did(LoadKV)
    assert len(load.blocks) == 2
    abort(harness, "a")
    assert harness.num_used == 3
    harness.post(KVLoaded(Attempt(RequestId("a"), 1), 2))
    assert harness.num_used == 0
    harness.machine.assert_quiescent()


def test_one_that_waited_for_blocks_being_read_gets_its_own_when_they_are_given_up() -> None:
    harness = harness_with(STORE)
    generate(harness, "a", 10, same=True)
    assert not any(isinstance(action, LoadKV) for action in generate(harness, "b", 10, same=True))
    actions = abort(harness, "a")
    [load] = [action for action in actions if isinstance(action, LoadKV)]
    assert load.key == Attempt(RequestId("b"), 1)


def test_the_reserve_counts_those_whose_kv_is_being_read() -> None:
    """They will decode soon."""
    harness = harness_with(STORE, scheduler={"reserve_policy": "fixed_blocks", "fixed_blocks": {"blocks": 3}})
    generate(harness, "a", 10)
    assert harness.plan is None
    assert harness.machine.load().headroom_blocks == 3


# ---------------------------------------------------------------- out


def test_nobody_else_is_preempted_while_the_blocks_of_a_victim_are_being_copied() -> None:
    harness = harness_with(WRITES_ONLY, cache={"num_blocks": 6}, scheduler={"prefill_order": "fifo"})
    for name, num_tokens in (("a", 7), ("b", 7), ("c", 5)):
        generate(harness, name, num_tokens)
    harness.finish_step()
    harness.finish_step()
    [stage] = harness.did(StageKV)  # a needs a third block, and takes it from c
    assert scheduled(harness) == ["a", "b"]
    harness.finish_step()
    assert scheduled(harness) == ["a"]  # b needs one too, and the next to be free is the one being copied
    harness.post(KVStaged(stage.key))
    harness.finish_step()
    assert scheduled(harness) == ["a", "b"]
    assert harness.machine.load().counters["preemptions"] == 1.0


def test_when_all_wait_for_a_copy_its_end_starts_the_next_step() -> None:
    harness = harness_with(WRITES_ONLY, cache={"num_blocks": 4})
    for name, num_tokens in (("a", 7), ("b", 5)):
        generate(harness, name, num_tokens)
    while not harness.did(StageKV):
        harness.finish_step()
    while harness.plan is not None:
        harness.finish_step()
    [stage] = harness.did(StageKV)
    harness.post(KVStaged(stage.key))
    assert scheduled(harness) == ["a"]


def test_the_end_of_an_earlier_save_says_nothing_of_a_request_that_was_preempted_again() -> None:
    harness = harness_with(WRITES_ONLY, cache={"num_blocks": 5})
    for name, num_tokens in (("a", 7), ("c", 3), ("b", 6)):
        generate(harness, name, num_tokens)
    harness.finish_step()
    harness.finish_step()
    [first] = harness.did(StageKV)  # a needs a third block, and takes it from b
    harness.post(KVStaged(first.key))
    abort(harness, "c")
    harness.finish_step()
    assert scheduled(harness) == ["a", "b"]  # b computes again what the store has not got yet
    harness.finish_step()
    harness.finish_step()
    [_, second] = harness.did(StageKV)  # b cannot grow and gives way again
    assert not sent(harness.post(KVStored(first.key, 1, 1)), RequestPreempted)
    harness.post(KVStaged(second.key))
    assert len(harness.did(StoreKV)) == 2
    [preempted] = sent(harness.post(KVStored(second.key, 1, 1)), RequestPreempted, ROUTER)
    assert (preempted.request_id, preempted.num_blocks) == ("b", 3)


def test_a_node_leaves_when_nothing_is_on_its_way_to_the_store() -> None:
    harness = harness_with({**STORE, "min_read_tokens": 1000})
    harness.receive(ROUTER, Generate(request=spec("a", 10, 1)))
    harness.post(StopRequested())
    harness.finish_step()
    [stage] = harness.did(StageKV)
    harness.post(KVStaged(stage.key))
    assert not harness.did(Exit)
    assert Exit("drained") in harness.post(KVStored(stage.key, 2, 2))
