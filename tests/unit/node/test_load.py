"""A field of a node's load means the same on nodes of every role."""

from __future__ import annotations

import pytest
from support.machines import ROUTER, NodeHarness, spec

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.messages.router_to_node import Generate, Prefill


def request(role: Role, name: str, prompt: list[int]) -> Message:
    if role is Role.PREFILL:
        return Prefill(request=spec(name, prompt, max_tokens=1), decode_node=None)
    return Generate(request=spec(name, prompt, max_tokens=1))


@pytest.mark.parametrize("role", list(Role))
def test_tokens_to_compute_and_tokens_that_wait_for_blocks_are_told_apart(role: Role) -> None:
    harness = NodeHarness(role, cache={"num_blocks": 8}, scheduler={"max_num_batched_tokens": 8})
    harness.receive(ROUTER, request(role, "runs", list(range(20))))
    harness.receive(ROUTER, request(role, "waits", list(range(100, 120))))
    load = harness.machine.load()
    assert (load.num_running, load.num_waiting) == (1, 1)
    assert load.queued_tokens == (20 - 8) + 20
    assert load.waiting_tokens == 20
    harness.run_steps()
    load = harness.machine.load()
    assert (load.queued_tokens, load.waiting_tokens) == (0, 0)
