"""Recordings that operators have asked nodes for and wait for."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.ids import NodeId
from kvrelay.runtime.dumps import Written
from router.events import DumpReported, DumpRequested

TIMEOUT_S = 10.0
"""Seconds an operator waits for a node and its messager."""


class NodeDumps:
    """Asks nodes for their recordings. ``post`` gives the machine an event."""

    def __init__(self, post: Callable[[DumpRequested], None]) -> None:
        self._post = post
        self._waiting: dict[str, asyncio.Queue[Written]] = {}

    async def of_node(self, node_id: NodeId, role: Role, *, with_prompts: bool) -> list[Written]:
        """Return what the node and its messager report of their files, in ``TIMEOUT_S`` at most."""
        dump_id = secrets.token_hex(8)
        reports = self._waiting[dump_id] = asyncio.Queue()
        self._post(DumpRequested(node_id, dump_id, with_prompts))
        written: list[Written] = []
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while len(written) < (1 if role is Role.MIXED else 2):
                    written.append(await reports.get())
        except TimeoutError:
            pass
        finally:
            del self._waiting[dump_id]
        return written

    def take(self, report: DumpReported) -> None:
        """Take a node's report. Nobody may wait for it any more."""
        reports = self._waiting.get(report.dump_id)
        if reports is not None:
            reports.put_nowait(Written(report.process, report.path, report.error))
