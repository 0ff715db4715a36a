"""A router asks a node for its recordings."""

from __future__ import annotations

import pytest
from support.machines import MESSAGER, P0, ROUTER, NodeHarness, sent

from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import DumpWritten, WriteDump
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.messager_to_node import MessagerDumped
from kvrelay.protocol.messages.node_to_messager import DumpMessager
from kvrelay.protocol.messages.node_to_router import Dumped
from kvrelay.protocol.messages.router_to_node import Dump

DUMP = Dump(dump_id="0a1b", with_prompts=True)


@pytest.mark.parametrize("role", Role)
def test_node_and_messager_write_and_the_router_is_told_of_each(role: Role) -> None:
    node = NodeHarness(role)
    actions = node.receive(ROUTER, DUMP)
    assert [action for action in actions if isinstance(action, WriteDump)] == [WriteDump(ROUTER, "0a1b", True)]
    to_messager = [DumpMessager(router=ROUTER, dump_id="0a1b", with_prompts=True)]
    assert sent(actions, DumpMessager, MESSAGER) == (to_messager if role is not Role.MIXED else [])

    actions = node.post(DumpWritten(ROUTER, "0a1b", "n0", "/n0.kvrec", ""))
    assert sent(actions, Dumped, ROUTER) == [Dumped(dump_id="0a1b", process="n0", path="/n0.kvrec", error="")]
    if role is not Role.MIXED:
        written = MessagerDumped(router=ROUTER, dump_id="0a1b", process="n0.messager", path="", error="full")
        actions = node.receive(MESSAGER, written)
        assert sent(actions, Dumped, ROUTER) == [Dumped(dump_id="0a1b", process="n0.messager", path="", error="full")]


@pytest.mark.parametrize("role", Role)
def test_nobody_else_gets_anything_written(role: Role) -> None:
    node = NodeHarness(role)
    assert not [action for action in node.receive(P0, DUMP) if isinstance(action, WriteDump)]
    forged = MessagerDumped(router=PeerId(ROUTER), dump_id="0a1b", process="x", path="/x", error="")
    assert sent(node.receive(P0, forged), Dumped) == []
