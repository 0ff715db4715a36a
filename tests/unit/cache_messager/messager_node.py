"""A node without an engine: a KV pool, a real messager process, and a socket to talk to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from pools import Pool

from cache_messager.launch import launched
from cache_messager.settings import MessagerSettings
from kvrelay.machine.contract import PeerLost, Received
from kvrelay.protocol.ids import MESSAGER, PeerId
from kvrelay.protocol.messages.base import LinkAddress, Message
from kvrelay.protocol.messages.messager_to_node import MessagerReady
from kvrelay.runtime.transport import Transport

M = TypeVar("M", bound=Message)


class MessagerNode:
    """Says what a test wants it to say to its messager, and hears the answers."""

    def __init__(self, name: str, directory: Path, pool: Pool) -> None:
        self.me = f"{name}#1"
        self.address = f"ipc://{directory}/{self.me}"
        self.pool = pool
        self.process: asyncio.subprocess.Process
        self.link: LinkAddress
        self.lost = asyncio.Event()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.transport = Transport(PeerId(self.me), self._deliver)
        self.transport.bind_private(MESSAGER, self.address)

    def _deliver(self, event: object) -> None:
        match event:
            case Received(message=message):
                self._inbox.put_nowait(message)
            case PeerLost():
                self.lost.set()

    def say(self, message: Message) -> None:
        self.transport.send(MESSAGER, message)

    async def hears(self, kind: type[M]) -> M:
        """Return the next message of type ``kind``, skipping others."""
        while True:
            message = await self._inbox.get()
            if isinstance(message, kind):
                return message


def settings_of(name: str, directory: Path, pool: Pool, **changes: object) -> MessagerSettings:
    """Return the settings of the messager of node ``name``: those of a default config but for ``changes``."""
    return MessagerSettings(
        me=PeerId(f"{name}.messager#1"),
        node=PeerId(f"{name}#1"),
        node_address=f"ipc://{directory}/{name}#1",
        geometry=pool.geometry,
        pool=pool.handle,
        host="127.0.0.1",
        runtime_dir=str(directory),
        **{"heartbeat_s": 0.1, "peer_timeout_s": 10.0, **changes},  # type: ignore[arg-type]
    )


@asynccontextmanager
async def messager_node(name: str, directory: Path, pool: Pool, **changes: object) -> AsyncIterator[MessagerNode]:
    """Run a node ``name`` with its messager, whose settings are those of a default config but for ``changes``."""
    node = MessagerNode(name, directory, pool)
    try:
        async with launched(settings_of(name, directory, pool, **changes)) as node.process:
            node.link = (await node.hears(MessagerReady)).link
            yield node
    finally:
        node.transport.close()
