"""What routers ask for of the recordings of a node and its messager: a part of a node's machine."""

from __future__ import annotations

from kvrelay.machine.contract import DumpWritten, WriteDump
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import MESSAGER, PeerId
from kvrelay.protocol.messages.messager_to_node import MessagerDumped
from kvrelay.protocol.messages.node_to_messager import DumpMessager
from kvrelay.protocol.messages.node_to_router import Dumped
from kvrelay.protocol.messages.router_to_node import Dump


class DumpRequests:
    """Has both processes write their files, and tells the router of each. ``has_messager``: there are two."""

    def __init__(self, outbox: Outbox, *, has_messager: bool) -> None:
        self._outbox = outbox
        self._has_messager = has_messager

    def write(self, router: PeerId, message: Dump) -> None:
        """Do what ``router`` asks for."""
        dump_id, with_prompts = message.dump_id, message.with_prompts
        self._outbox.do(WriteDump(router, dump_id, with_prompts))
        if self._has_messager:
            self._outbox.send(MESSAGER, DumpMessager(router=router, dump_id=dump_id, with_prompts=with_prompts))

    def written(self, answer: DumpWritten | MessagerDumped) -> None:
        """Tell the router of one file."""
        dumped = Dumped(dump_id=answer.dump_id, process=answer.process, path=answer.path, error=answer.error)
        self._outbox.send(answer.router, dumped)
