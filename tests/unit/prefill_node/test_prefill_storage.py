"""A prefill node and its store: what is held while KV is on its way, who waits for it, and who does not."""

from __future__ import annotations

from typing import Any

from support.machines import ROUTER, NodeHarness, spec

from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import Exit, KVLoaded, KVStaged, KVStored, LoadKV, StageKV, StopRequested
from kvrelay.protocol.ids import Attempt, RequestId
from kvrelay.protocol.messages.router_to_node import Abort, Prefill

STORE = {"backend": "file", "min_read_tokens": 1}


def prefill_harness(**store: Any) -> NodeHarness:
    return NodeHarness(Role.PREFILL, storage={**STORE, **store})


def prefill(harness: NodeHarness, name: str) -> list[Any]:
    """Send a prompt of ten tokens, the same for all, that needs no decode node."""
    return harness.receive(ROUTER, Prefill(request=spec(name, 10, 1), decode_node=None))


def test_a_prompt_is_computed_from_where_the_store_ends() -> None:
    harness = prefill_harness()
    prefill(harness, "a")
    [load] = harness.did(LoadKV)
    assert (len(load.blocks), harness.plan) == (2, None)
    harness.post(KVLoaded(Attempt(RequestId("a"), 1), 1))
    assert harness.plan is not None
    assert [(item.start, item.num_tokens) for item in harness.plan.batch] == [(4, 6)]


def test_a_client_leaves_while_the_store_writes_to_the_blocks() -> None:
    harness = prefill_harness()
    prefill(harness, "a")
    harness.receive(ROUTER, Abort(request_id=RequestId("a"), epoch=1))
    assert harness.num_used == 3
    harness.post(KVLoaded(Attempt(RequestId("a"), 1), 2))
    assert harness.num_used == 0
    harness.machine.assert_quiescent()


def test_one_that_waited_for_blocks_being_read_gets_its_own_when_they_are_given_up() -> None:
    harness = prefill_harness()
    prefill(harness, "a")
    prefill(harness, "b")
    assert [load.key for load in harness.did(LoadKV)] == [Attempt(RequestId("a"), 1)]
    harness.receive(ROUTER, Abort(request_id=RequestId("a"), epoch=1))
    assert [load.key for load in harness.did(LoadKV)] == [Attempt(RequestId("a"), 1), Attempt(RequestId("b"), 1)]


def test_a_node_leaves_when_nothing_is_on_its_way_to_the_store() -> None:
    harness = prefill_harness(min_read_tokens=1000)
    prefill(harness, "a")
    harness.post(StopRequested())
    harness.finish_step()
    [stage] = harness.did(StageKV)
    harness.post(KVStaged(stage.key))
    assert not harness.did(Exit)
    assert Exit("drained") in harness.post(KVStored(stage.key, 2, 2))
