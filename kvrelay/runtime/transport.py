"""Messages over ZMQ: one ROUTER socket for incoming connections, one DEALER per outgoing connection.

Nothing here blocks. If a message cannot be queued immediately, because ``send_queue`` messages are queued already, the
machine gets PeerLost for its peer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from kvrelay.addresses import has_only_ipv6, is_ipv6, listening_address, named_host
from kvrelay.errors import LocalProtocolError, RemoteProtocolError
from kvrelay.machine.contract import PeerLost, Received
from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message, ProtocolViolation
from kvrelay.runtime.time_slice import MAX_TIME_SLICE_S

MAX_PART_BYTES = 64 << 20
"""Maximum size of a message part. ZMQ drops a connection that sends more."""

_READS_PER_TIME_SLICE = 64
"""How many messages of one socket are read, and for how long, before others have the loop."""

_MAX_MUTED = 1024
_LOOKUP_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)


class Transport:
    """All connections of one process.

    ``deliver`` is called with Received and PeerLost events. It must not call the transport before it returns to the
    loop. A peer that sends an undecodable message gets ProtocolViolation, and its further messages are ignored.
    """

    def __init__(self, me: PeerId, deliver: Callable[[object], None], *, send_queue: int = 1000) -> None:
        self.me = me
        self._deliver = deliver
        self._send_queue = send_queue
        self._context = zmq.Context()
        self._loop = asyncio.get_running_loop()
        self._router: zmq.Socket[bytes] | None = None
        self._dealers: dict[PeerId, zmq.Socket[bytes]] = {}
        self._lookups: dict[PeerId, asyncio.Task[None]] = {}
        self._held: dict[PeerId, deque[tuple[Message, Sequence[memoryview]]]] = {}
        self._names: dict[zmq.Socket[bytes], PeerId] = {}
        self._muted: dict[PeerId, None] = {}
        self._aliases: dict[PeerId, PeerId] = {}
        self._aliased: dict[PeerId, PeerId] = {}

    # ------------------------------------------------------------ connections

    def bind(self, *addresses: str) -> list[str]:
        """Bind ``addresses`` (``tcp://host:0``: any free port) and return the bound addresses."""
        if self._router is not None:
            raise LocalProtocolError("already bound")
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        bound = []
        for address in addresses:
            endpoint = listening_address(address)
            self._router.setsockopt(zmq.IPV6, is_ipv6(endpoint))
            self._router.bind(endpoint)
            bound.append(self._router.getsockopt_string(zmq.LAST_ENDPOINT))
        self._watch(self._router)
        return bound

    def connect(self, peer: PeerId, address: str) -> None:
        """Connect to ``address`` under the name ``peer``. Messages sent before it answers are queued."""
        if peer in self._dealers:
            raise LocalProtocolError(f"already connected to {peer}")
        dealer = self._socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, self.me.encode())
        self._dealers[peer] = dealer
        self._names[dealer] = peer
        named = named_host(address)
        if named is None:
            self._reach(dealer, address, ipv6=is_ipv6(address))
        else:
            self._held[peer] = deque()
            self._lookups[peer] = self._loop.create_task(self._look_up(peer, address, *named))

    def _reach(self, dealer: zmq.Socket[bytes], address: str, *, ipv6: bool) -> None:
        dealer.setsockopt(zmq.IPV6, ipv6)
        dealer.connect(address)
        self._watch(dealer)

    async def _look_up(self, peer: PeerId, address: str, host: str, port: int) -> None:
        """Reach out to ``peer`` once the kind of its address is known; hold back what is sent until then.

        ZMQ looks up either IPv4 or IPv6 addresses. It is given the name, not the address found here, because the
        address may have changed when it reconnects.
        """
        has_warned = False
        while True:
            try:
                ipv6 = await has_only_ipv6(host, port)
                break
            except OSError as error:
                if not has_warned:
                    logger.warning("no address for %s yet: %s", address, error.strerror)
                has_warned = True
            await asyncio.sleep(_LOOKUP_INTERVAL_S)
        del self._lookups[peer]
        self._reach(self._dealers[peer], address, ipv6=ipv6)
        for message, payload in self._held.pop(peer):
            self.send(peer, message, payload)

    def alias(self, name: PeerId, peer: PeerId) -> None:
        """Use ``name`` for ``peer``, which connects to us, from now on."""
        self._aliases[peer], self._aliased[name] = name, peer

    def disconnect(self, peer: PeerId) -> None:
        """Drop the outgoing connection to ``peer`` with its queued messages. No effect on incoming connections."""
        lookup = self._lookups.pop(peer, None)
        if lookup is not None:
            lookup.cancel()
        self._held.pop(peer, None)
        dealer = self._dealers.pop(peer, None)
        if dealer is not None:
            self._close(dealer)

    def close(self) -> None:
        """Close every connection. Messages that are not sent within 200 ms are lost."""
        for peer in list(self._lookups):
            self.disconnect(peer)
        for dealer in self._dealers.values():
            self._close(dealer, linger_ms=200)
        self._dealers.clear()
        if self._router is not None:
            self._close(self._router, linger_ms=200)
            self._router = None
        self._context.term()

    # ------------------------------------------------------------ sending

    def send(self, peer: PeerId, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Queue ``message`` and raw parts. Parts are not copied: do not change them before the peer answers."""
        held = self._held.get(peer)
        if held is not None:
            if len(held) < self._send_queue:
                held.append((message, payload))
            else:
                self._lose(peer, f"cannot send {type(message).__name__}: its address is not known yet")
            return
        socket = self._dealers.get(peer, self._router)
        if socket is None:
            self._lose(peer, "not connected")
            return
        identity = self._aliased.get(peer, peer).encode()
        head = [encode(message)] if peer in self._dealers else [identity, encode(message)]
        try:
            self._send_parts(socket, head, payload)
        except zmq.ZMQError as error:
            self._lose(peer, f"cannot send {type(message).__name__}: {error.strerror}")

    def _send_parts(self, socket: zmq.Socket[bytes], head: list[bytes], payload: Sequence[memoryview]) -> None:
        parts: list[bytes | memoryview] = [*head, *payload]
        for index, part in enumerate(parts):
            flags = zmq.DONTWAIT | (zmq.SNDMORE if index < len(parts) - 1 else 0)
            socket.send(part, flags, copy=index < len(head))
        # Sending may swallow the edge that tells of something to read.
        if int(socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._read, socket)

    def _lose(self, peer: PeerId, reason: str) -> None:
        self._loop.call_soon(self._deliver, PeerLost(peer, reason))

    # ------------------------------------------------------------ receiving

    def _read(self, socket: zmq.Socket[bytes]) -> None:
        ends_s = time.monotonic() + MAX_TIME_SLICE_S
        for _ in range(_READS_PER_TIME_SLICE):
            if socket.closed:
                return
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            if socket is not self._router:
                self._take(self._names[socket], frames)
            elif (peer := self._inbound(frames[0].bytes)) is not None:
                self._take(peer, frames[1:])
            if time.monotonic() >= ends_s:
                break
        self._loop.call_soon(self._read, socket)

    def _inbound(self, identity: bytes) -> PeerId | None:
        """Return the peer that connects as ``identity``; None if that is the name of one of our own connections."""
        name = PeerId(identity.decode("utf-8", "replace"))
        taken = name in self._dealers or name in self._aliased
        return None if taken else self._aliases.get(name, name)

    def _take(self, peer: PeerId, frames: list[zmq.Frame]) -> None:
        if peer in self._muted:
            return
        try:
            if not frames:
                raise RemoteProtocolError("empty message")
            message = decode(frames[0].buffer)
        except RemoteProtocolError as error:
            self._violation(peer, error.message)
            return
        if isinstance(message, ProtocolViolation):
            logger.error("peer %s cannot decode our message: %s", peer, message.reason)
            self._mute(peer)
            self._deliver(PeerLost(peer, message.reason))
            return
        self._deliver(Received(peer, message, tuple(frame.buffer for frame in frames[1:])))

    def _violation(self, peer: PeerId, reason: str) -> None:
        logger.error("dropping peer %r: %s", peer, reason)
        self.send(peer, ProtocolViolation(reason=reason))
        self._mute(peer)
        self._deliver(PeerLost(peer, reason))

    def _mute(self, peer: PeerId) -> None:
        self._muted[peer] = None
        if len(self._muted) > _MAX_MUTED:
            del self._muted[next(iter(self._muted))]

    # ------------------------------------------------------------ sockets

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, self._send_queue)
        socket.setsockopt(zmq.RCVHWM, self._send_queue)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_PART_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        return socket

    def _watch(self, socket: zmq.Socket[bytes]) -> None:
        self._loop.add_reader(socket.fileno(), self._read, socket)
        self._loop.call_soon(self._read, socket)

    def _close(self, socket: zmq.Socket[bytes], linger_ms: int = 0) -> None:
        self._loop.remove_reader(socket.fileno())
        self._names.pop(socket, None)
        socket.close(linger_ms)
