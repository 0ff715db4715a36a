"""The messager's process: the machine in its shell, with the sockets and the pools."""

from __future__ import annotations

import asyncio
import os
from contextlib import closing
from pathlib import Path

import msgspec

from cache_messager.links import Link, PayloadLink, SharedMemoryLink
from cache_messager.settings import MessagerSettings, host_id
from cache_messager.state import MessagerMachine
from cache_messager.work import BlocksWritten, MapPool, PoolMapped, SendFrame, UnmapPool, WriteBlocks
from kvrelay.core.addresses import tcp_address
from kvrelay.core.clock import Clock
from kvrelay.core.errors import KVRelayError
from kvrelay.core.kv_memory import KVMemory
from kvrelay.core.logging import log_event
from kvrelay.core.machine import PeerLost
from kvrelay.core.messages.base import LinkAddress
from kvrelay.core.shell import Shell
from kvrelay.core.transport import Transport

_QUEUE = 4000
"""Messages that may wait for one peer: more than a link's credit lets be under way, and a node's pile of signals."""


async def serve(settings: MessagerSettings, lifeline_fd: int) -> str:
    """Move blocks until the node says stop or is gone; return which. Nothing is left behind.

    ``lifeline_fd`` is a pipe whose other end only the node holds: it ends when the node does. Raises PeerLostError or
    GeometryMismatchError if the node's pool cannot be mapped.
    """
    ipc_file = Path(settings.runtime_dir) / settings.me
    loop = asyncio.get_running_loop()
    with (
        closing(KVMemory.attach(settings.geometry, settings.pool)) as pool,
        closing(Transport(settings.me, lambda event: shell.post(event), send_queue=_QUEUE)) as transport,  # noqa: PLW0108
    ):
        tcp, ipc = transport.bind(tcp_address(settings.host, 0), f"ipc://{ipc_file}")
        link = LinkAddress(peer=settings.me, host_id=host_id(), tcp=tcp, ipc=ipc)
        shell = Shell(MessagerMachine(settings, link), clock=Clock())
        transport.connect(settings.node, settings.node_address)
        loop.add_reader(lifeline_fd, _on_lifeline, lifeline_fd, settings, shell)
        try:
            with closing(BlockMover(settings, pool, transport, shell)):
                return await shell.run(transport)
        finally:
            loop.remove_reader(lifeline_fd)
            ipc_file.unlink(missing_ok=True)


def _on_lifeline(lifeline_fd: int, settings: MessagerSettings, shell: Shell) -> None:
    if not os.read(lifeline_fd, 1024):
        asyncio.get_running_loop().remove_reader(lifeline_fd)
        shell.post(PeerLost(settings.node, "its process has ended"))


class BlockMover:
    """Performs what the machine asks for beyond the core actions. Writes are done when ``write_blocks`` returns."""

    def __init__(self, settings: MessagerSettings, pool: KVMemory, transport: Transport, shell: Shell) -> None:
        self._geometry = settings.geometry
        self._pool = pool
        self._transport = transport
        self._shell = shell
        self._payload: Link = PayloadLink(pool, checksum=settings.checksum)
        self._shared_memory: Link = SharedMemoryLink(pool)
        self._mapped: dict[int, KVMemory] = {}
        shell.handle_with(SendFrame, self.send_frame)
        shell.handle_with(WriteBlocks, self.write_blocks)
        shell.handle_with(MapPool, self.map_pool)
        shell.handle_with(UnmapPool, self.unmap_pool)

    def send_frame(self, action: SendFrame) -> None:
        """Fill in the digest and send the frame with what its link lets travel."""
        link = self._payload if action.with_payload else self._shared_memory
        digest, parts = link.read(action.frame, action.source_block_ids)
        self._transport.send(action.peer, msgspec.structs.replace(action.frame, digest=digest), parts)

    def write_blocks(self, action: WriteBlocks) -> None:
        """Copy the blocks into the pool from the payload or from the sender's pool."""
        source = self._mapped.get(action.link_id)
        link = self._payload if source is None else SharedMemoryLink(self._pool, source)
        ok = link.write(action.frame, action.payload)
        self._shell.post(BlocksWritten(action.link_id, action.frame, ok))

    def map_pool(self, action: MapPool) -> None:
        """Map the sender's pool; if that fails, for whatever reason, payload will do."""
        try:
            self._mapped[action.link_id] = KVMemory.attach(self._geometry, action.handle)
        except (KVRelayError, OSError, ValueError) as error:
            log_event("warning", "pool not mapped", {"pid": action.handle.pid, "reason": error})
        self._shell.post(PoolMapped(action.link_id, action.link_id in self._mapped))

    def unmap_pool(self, action: UnmapPool) -> None:
        """Give the sender's pool back."""
        self._mapped.pop(action.link_id).close()

    def close(self) -> None:
        """Give every mapped pool back."""
        while self._mapped:
            self._mapped.popitem()[1].close()
