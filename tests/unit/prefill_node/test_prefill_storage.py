"""A prefill node and its store: what is held while KV is on its way, who waits for it, and who does not."""

from __future__ import annotations

from typing import Any

from support.machines import ROUTER, NodeDesk, spec

from kvrelay.core.config import Role
from kvrelay.core.ids import Attempt
from kvrelay.core.machine import Exit, KVLoaded, KVStaged, KVStored, LoadKV, StageKV, StopRequested
from kvrelay.core.messages.router_to_node import Abort, Prefill

STORE = {"backend": "file", "min_read_tokens": 1}


def prefill_desk(**store: Any) -> NodeDesk:
    return NodeDesk(Role.PREFILL, storage={**STORE, **store})


def prefill(desk: NodeDesk, name: str) -> list[Any]:
    """Send a prompt of ten tokens, the same for all, that needs no decode node."""
    return desk.hear(ROUTER, Prefill(request=spec(name, 10, 1), decode_node=None))


def test_a_prompt_is_computed_from_where_the_store_ends() -> None:
    desk = prefill_desk()
    prefill(desk, "a")
    [load] = desk.did(LoadKV)
    assert (len(load.blocks), desk.plan) == (2, None)
    desk.tell(KVLoaded(Attempt("a", 1), 1))
    assert desk.plan is not None
    assert [(item.start, item.num_tokens) for item in desk.plan.batch] == [(4, 6)]


def test_a_client_leaves_while_the_store_writes_to_the_blocks() -> None:
    desk = prefill_desk()
    prefill(desk, "a")
    desk.hear(ROUTER, Abort(request_id="a", epoch=1))
    assert desk.num_used == 3
    desk.tell(KVLoaded(Attempt("a", 1), 2))
    assert desk.num_used == 0
    desk.machine.assert_quiescent()


def test_one_that_waited_for_blocks_being_read_gets_its_own_when_they_are_given_up() -> None:
    desk = prefill_desk()
    prefill(desk, "a")
    prefill(desk, "b")
    assert [load.key for load in desk.did(LoadKV)] == [Attempt("a", 1)]
    desk.hear(ROUTER, Abort(request_id="a", epoch=1))
    assert [load.key for load in desk.did(LoadKV)] == [Attempt("a", 1), Attempt("b", 1)]


def test_a_node_leaves_when_nothing_is_on_its_way_to_the_store() -> None:
    desk = prefill_desk(min_read_tokens=1000)
    prefill(desk, "a")
    desk.tell(StopRequested())
    desk.finish_step()
    [stage] = desk.did(StageKV)
    desk.tell(KVStaged(stage.key))
    assert not desk.did(Exit)
    assert Exit("drained") in desk.tell(KVStored(stage.key, 2, 2))
