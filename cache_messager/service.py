"""The messager's process: the machine in its shell, with the sockets, the pool and the links."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from cache_messager.machine import MessagerMachine
from cache_messager.mover import BlockMover
from cache_messager.recording import MESSAGER_EVENTS, MessagerStart
from cache_messager.settings import MessagerSettings, host_id
from kvrelay.addresses import tcp_address
from kvrelay.kv_pool.attach import open_pool
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import PeerLost
from kvrelay.protocol.ids import MESSAGER, peer_name
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.runtime.dumps import Dumps
from kvrelay.runtime.faults import open_transport
from kvrelay.runtime.keys import Keys
from kvrelay.runtime.logging import log_event
from kvrelay.runtime.runtime_dir import new_socket_file
from kvrelay.runtime.shell import Shell
from kvrelay.runtime.transport import Transport

_QUEUE = 4000
"""Maximum messages queued per peer: more than a link's unacknowledged frames, and than a node's queued signals."""


async def serve(settings: MessagerSettings, lifeline_fd: int) -> str:
    """Move blocks until the node stops the messager or has ended; return the reason. All resources are released.

    ``lifeline_fd`` is a pipe whose other end only the node holds: at end of file the node has ended. Raises
    PeerLostError or GeometryMismatchError if the node's pool cannot be opened.
    """
    ipc_file = new_socket_file(Path(settings.runtime_dir), peer_name(settings.me))
    loop = asyncio.get_running_loop()
    with (
        closing(open_pool(settings.geometry, settings.pool)) as pool,
        closing(BlockMover(settings, pool)) as mover,
        closing(_transport(settings, lambda event: shell.post(event))) as transport,  # noqa: PLW0108
    ):
        tcp, ipc = transport.bind(tcp_address(settings.host, 0), f"ipc://{ipc_file}")
        offers = mover.offers
        _log_offers(settings, [offer.kind for offer in offers])
        link = LinkAddress(peer=settings.me, host_id=host_id(), tcp=tcp, ipc=ipc)
        start = MessagerStart.of(settings, link, offers)
        dumps = Dumps(peer_name(settings.me), MESSAGER, start, MESSAGER_EVENTS, settings.recording)
        shell = Shell(MessagerMachine(settings, link, offers), clock=Clock(), dumps=dumps)
        mover.serve(transport, shell)
        transport.connect_private(settings.node, settings.node_address)
        loop.add_reader(lifeline_fd, _on_lifeline, lifeline_fd, settings, shell)
        try:
            return await shell.run(transport)
        finally:
            loop.remove_reader(lifeline_fd)
            ipc_file.unlink(missing_ok=True)


def _transport(settings: MessagerSettings, deliver: Callable[[object], None]) -> Transport:
    keys = None if settings.keys is None else Keys.load(Path(settings.keys), peer_name(settings.node))
    return open_transport(settings.me, deliver, settings.faults, send_queue=_QUEUE, keys=keys)


def _log_offers(settings: MessagerSettings, offered: list[str]) -> None:
    """Log the kinds of link this messager can offer. A receiver logs the kinds it cannot accept."""
    left_out = [kind for kind in settings.links if kind not in offered]
    log_event("info", "links", {"offered": ", ".join(offered), "not_possible": ", ".join(left_out) or "none"})


def _on_lifeline(lifeline_fd: int, settings: MessagerSettings, shell: Shell) -> None:
    if not os.read(lifeline_fd, 1024):
        asyncio.get_running_loop().remove_reader(lifeline_fd)
        shell.post(PeerLost(settings.node, "its end of the pipe is closed"))
