"""A decode node and its store: what is held while KV is on its way, who waits for it, and who does not."""

from __future__ import annotations

from typing import Any

from support.machines import ROUTER, NodeDesk, sent, spec

from kvrelay.core.config import Role
from kvrelay.core.ids import Attempt
from kvrelay.core.machine import Exit, KVLoaded, KVStaged, KVStored, LoadKV, StageKV, StopRequested, StoreKV
from kvrelay.core.messages.node_to_router import RequestPreempted
from kvrelay.core.messages.router_to_node import Abort, Generate

STORE = {"backend": "file", "min_read_tokens": 1, "resume": "auto"}
WRITES_ONLY = {**STORE, "min_read_tokens": 1000, "write_policy": "on_preempt"}


def desk_with(store: dict[str, Any], **sections: dict[str, Any]) -> NodeDesk:
    return NodeDesk(Role.MIXED, storage=store, **sections)


def generate(desk: NodeDesk, name: str, num_tokens: int, *, same: bool = False) -> list[Any]:
    """Ask for many tokens after a prompt of its own, or after one that is the same for all."""
    first = 1000 if same else 100 * ord(name)
    return desk.hear(ROUTER, Generate(request=spec(name, list(range(first, first + num_tokens)), 100)))


def abort(desk: NodeDesk, name: str) -> list[Any]:
    return desk.hear(ROUTER, Abort(request_id=name, epoch=1))


def scheduled(desk: NodeDesk) -> list[str]:
    """Return the names of those in the step that runs."""
    assert desk.plan is not None
    return [item.sequence.spec.request_id for item in desk.plan.batch]


# ---------------------------------------------------------------- in


def test_a_client_leaves_while_the_store_writes_to_the_blocks() -> None:
    desk = desk_with(STORE)
    generate(desk, "a", 10)
    [load] = desk.did(LoadKV)
    assert len(load.blocks) == 2
    abort(desk, "a")
    assert desk.num_used == 3
    desk.tell(KVLoaded(Attempt("a", 1), 2))
    assert desk.num_used == 0
    desk.machine.assert_quiescent()


def test_one_that_waited_for_blocks_being_read_gets_its_own_when_they_are_given_up() -> None:
    desk = desk_with(STORE)
    generate(desk, "a", 10, same=True)
    assert not any(isinstance(action, LoadKV) for action in generate(desk, "b", 10, same=True))
    actions = abort(desk, "a")
    [load] = [action for action in actions if isinstance(action, LoadKV)]
    assert load.key == Attempt("b", 1)


def test_the_reserve_counts_those_whose_kv_is_being_read() -> None:
    """They will decode soon."""
    desk = desk_with(STORE, scheduler={"reserve_policy": "fixed_blocks", "fixed_blocks": {"blocks": 3}})
    generate(desk, "a", 10)
    assert desk.plan is None
    assert desk.machine.load().gauges["reserved_blocks"] == 3.0


# ---------------------------------------------------------------- out


def test_nobody_else_is_preempted_while_the_blocks_of_a_victim_are_being_copied() -> None:
    desk = desk_with(WRITES_ONLY, cache={"num_blocks": 6}, scheduler={"prefill_order": "fifo"})
    for name, num_tokens in (("a", 7), ("b", 7), ("c", 5)):
        generate(desk, name, num_tokens)
    desk.finish_step()
    desk.finish_step()
    [stage] = desk.did(StageKV)  # a needs a third block, and takes it from c
    assert scheduled(desk) == ["a", "b"]
    desk.finish_step()
    assert scheduled(desk) == ["a"]  # b needs one too, and the next to be free is the one being copied
    desk.tell(KVStaged(stage.key))
    desk.finish_step()
    assert scheduled(desk) == ["a", "b"]
    assert desk.machine.load().counters["preemptions"] == 1.0


def test_when_all_wait_for_a_copy_its_end_starts_the_next_step() -> None:
    desk = desk_with(WRITES_ONLY, cache={"num_blocks": 4})
    for name, num_tokens in (("a", 7), ("b", 5)):
        generate(desk, name, num_tokens)
    while not desk.did(StageKV):
        desk.finish_step()
    while desk.plan is not None:
        desk.finish_step()
    [stage] = desk.did(StageKV)
    desk.tell(KVStaged(stage.key))
    assert scheduled(desk) == ["a"]


def test_the_end_of_an_earlier_save_says_nothing_of_a_request_that_was_preempted_again() -> None:
    desk = desk_with(WRITES_ONLY, cache={"num_blocks": 5})
    for name, num_tokens in (("a", 7), ("c", 3), ("b", 6)):
        generate(desk, name, num_tokens)
    desk.finish_step()
    desk.finish_step()
    [first] = desk.did(StageKV)  # a needs a third block, and takes it from b
    desk.tell(KVStaged(first.key))
    abort(desk, "c")
    desk.finish_step()
    assert scheduled(desk) == ["a", "b"]  # b computes again what the store has not got yet
    desk.finish_step()
    desk.finish_step()
    [_, second] = desk.did(StageKV)  # b cannot grow and gives way again
    assert not sent(desk.tell(KVStored(first.key, 1, 1)), RequestPreempted)
    desk.tell(KVStaged(second.key))
    assert len(desk.did(StoreKV)) == 2
    [preempted] = sent(desk.tell(KVStored(second.key, 1, 1)), RequestPreempted, ROUTER)
    assert (preempted.request_id, preempted.num_blocks) == ("b", 3)


def test_a_node_leaves_when_nothing_is_on_its_way_to_the_store() -> None:
    desk = desk_with({**STORE, "min_read_tokens": 1000})
    desk.hear(ROUTER, Generate(request=spec("a", 10, 1)))
    desk.tell(StopRequested())
    desk.finish_step()
    [stage] = desk.did(StageKV)
    desk.tell(KVStaged(stage.key))
    assert not desk.did(Exit)
    assert Exit("drained") in desk.tell(KVStored(stage.key, 2, 2))
