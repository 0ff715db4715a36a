"""Exchange of blocks between hosts: each store serves its own blocks and fetches others over one Transport."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from kvrelay.addresses import split_tcp_address, tcp_address
from kvrelay.errors import StorageUnavailableError
from kvrelay.machine.contract import PeerLost, Received
from kvrelay.protocol.block_hash import HASH_BYTES
from kvrelay.protocol.ids import PeerId, new_incarnation, peer_id
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.messages.store_to_store import BlocksDropped, BlocksFetched, DropBlocks, FetchBlocks
from kvrelay.runtime.keys import Keys
from kvrelay.runtime.transport import Transport
from kvstore.storage.block_format import Value

T = TypeVar("T")

_MAX_SERVING = 8
"""Maximum concurrent requests from other hosts; further ones are answered with misses."""

_MAX_BLOCKS = 256
"""Maximum blocks per request; larger requests are answered with misses."""

logger = logging.getLogger(__name__)


class HoldsValues(Protocol):
    """The local store whose blocks are served."""

    async def read_values(self, block_hashes: Sequence[bytes]) -> list[Value | None]:
        """Return verified values, each in its own memory, and None for missing blocks."""

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        """Delete blocks; return the number deleted."""


class BlockExchange:
    """The exchange of this store with all others. Peers are identified by their addresses.

    With ``keys`` an address begins with the name of the peer's key: ``d0.tcp://10.0.0.2:4000``.
    """

    def __init__(self, namespace: bytes, local: HoldsValues, keys: Keys | None = None) -> None:
        self._keys = keys
        self._namespace = namespace
        self._local = local
        self._ids = itertools.count(1)
        self._transport: Transport | None = None
        self._peers: set[str] = set()
        self._answers: dict[int, tuple[str, asyncio.Future[Received]]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    def open(self, host: str) -> str:
        """Bind a free port of ``host``; return the address."""
        name = "kv-store" if self._keys is None else f"{self._keys.name}.kv-store"
        self._transport = Transport(peer_id(name, new_incarnation()), self._deliver, keys=self._keys)
        [address] = self._transport.bind(tcp_address(host, 0))
        return address if self._keys is None else f"{self._keys.name}.{address}"

    async def fetch(self, address: str, block_hashes: Sequence[bytes], timeout_s: float) -> list[Value | None]:
        """Return the values from the store at ``address``. Raises StorageUnavailableError if it does not answer.

        The values are not verified.
        """
        fetch_id = next(self._ids)
        message = FetchBlocks(fetch_id=fetch_id, namespace=self._namespace, block_hashes=list(block_hashes))
        answer = await self._ask(address, fetch_id, message, timeout_s)
        if not isinstance(answer.message, BlocksFetched) or len(answer.message.found) != len(block_hashes):
            raise StorageUnavailableError(f"the store at {address} gave an invalid answer")
        parts = iter(answer.payload)
        values = [next(parts, None) if found else None for found in answer.message.found]
        return [None if value is None else np.frombuffer(value, np.uint8) for value in values]

    async def drop(self, address: str, block_hashes: Sequence[bytes], timeout_s: float) -> int:
        """Have the store at ``address`` delete blocks; return the number deleted. Raises as ``fetch``."""
        fetch_id = next(self._ids)
        message = DropBlocks(fetch_id=fetch_id, namespace=self._namespace, block_hashes=list(block_hashes))
        answer = await self._ask(address, fetch_id, message, timeout_s)
        return answer.message.num_blocks if isinstance(answer.message, BlocksDropped) else 0

    async def close(self) -> None:
        """Stop serving and drop all connections. Pending calls fail."""
        for address in list(self._peers):
            self._lose(address, "closed")
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    # ------------------------------------------------------------ requests to peers

    async def _ask(self, address: str, fetch_id: int, message: Message, timeout_s: float) -> Received:
        if self._transport is None:
            raise StorageUnavailableError("the exchange of blocks is closed")
        if address not in self._peers:
            self._transport.connect(PeerId(address), _place(address))
            self._peers.add(address)
        future: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
        self._answers[fetch_id] = address, future
        try:
            self._transport.send(PeerId(address), message)
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            self._lose(address, f"no answer within {timeout_s:.3g} s")
            raise StorageUnavailableError(f"the store at {address} did not answer within {timeout_s:.3g} s") from error
        finally:
            del self._answers[fetch_id]

    def _lose(self, address: str, reason: str) -> None:
        """Drop the connection with its queued messages; fail the calls that wait for it."""
        if address in self._peers and self._transport is not None:
            self._peers.discard(address)
            self._transport.disconnect(PeerId(address))
        for asked, future in self._answers.values():
            if asked == address and not future.done():
                future.set_exception(StorageUnavailableError(f"the store at {address}: {reason}"))

    # ------------------------------------------------------------ requests of peers

    def _deliver(self, event: object) -> None:
        match event:
            case PeerLost(peer, reason):
                self._lose(peer, reason)
            case Received(peer, FetchBlocks() as message, _):
                self._serve(self._answer_fetch(peer, message))
            case Received(peer, DropBlocks() as message, _):
                self._serve(self._answer_drop(peer, message))
            case Received(peer, (BlocksFetched() | BlocksDropped()) as message, _):
                asked, future = self._answers.get(message.fetch_id, ("", None))
                if future is not None and asked == peer and not future.done():
                    future.set_result(event)
            case _:
                logger.warning("KV store: unexpected %s", type(event).__name__)

    def _serve(self, answering: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(answering)
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _answer_fetch(self, peer: PeerId, message: FetchBlocks) -> None:
        values = await self._if_free(message, self._local.read_values) or [None] * len(message.block_hashes)
        found = [value is not None for value in values]
        parts = [value.data for value in values if value is not None]
        self._send(peer, BlocksFetched(fetch_id=message.fetch_id, found=found), parts)

    async def _answer_drop(self, peer: PeerId, message: DropBlocks) -> None:
        num_blocks = await self._if_free(message, self._local.delete) or 0
        self._send(peer, BlocksDropped(fetch_id=message.fetch_id, num_blocks=num_blocks))

    async def _if_free(
        self, message: FetchBlocks | DropBlocks, do: Callable[[Sequence[bytes]], Awaitable[T]]
    ) -> T | None:
        too_much = len(self._serving) > _MAX_SERVING or len(message.block_hashes) > _MAX_BLOCKS
        unfit = any(len(block_hash) != HASH_BYTES for block_hash in message.block_hashes)
        if too_much or unfit or message.namespace != self._namespace:
            return None
        try:
            return await do(message.block_hashes)
        except StorageUnavailableError as error:
            logger.warning("cannot serve blocks: %s", error.message)
            return None

    def _send(self, peer: PeerId, message: Message, parts: Sequence[memoryview] = ()) -> None:
        if self._transport is not None:
            self._transport.send(peer, message, parts)


def _place(address: str) -> str:
    """Return where the store at ``address`` listens. Raises StorageUnavailableError if it is no address."""
    place = address[max(0, address.find("tcp://")) :]
    try:
        _, port = split_tcp_address(place)
    except ValueError:
        port = 0
    if not port:
        raise StorageUnavailableError(f"{address!r:.100} is no address of a store")
    return place
