"""Messages over ZMQ: one ROUTER socket for incoming connections, one DEALER per outgoing connection, and a PAIR between
a node and its messager.

Nothing here blocks. If a message cannot be queued immediately, because ``send_queue`` messages are queued already, the
machine gets PeerLost for its peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from kvrelay.addresses import has_only_ipv6, is_ipv6, listening_address, named_host
from kvrelay.errors import LocalProtocolError, RemoteProtocolError
from kvrelay.machine.contract import PeerLost, Received
from kvrelay.machine.log_limit import LogLimit
from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message, ProtocolViolation
from kvrelay.runtime.authenticator import HANDSHAKE_MS, Authenticator
from kvrelay.runtime.keys import Keys, key_name
from kvrelay.runtime.peer_names import PeerNames, claimed_peer
from kvrelay.runtime.time_slice import MAX_TIME_SLICE_S

MAX_PART_BYTES = 64 << 20
"""Maximum size of a message part. ZMQ drops a connection that sends more."""

_READS_PER_TIME_SLICE = 64
"""How many messages of one socket are read, and for how long, before others have the loop."""

_LOOKUP_INTERVAL_S = 1.0

_LAST, _MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)
"""Flags of the last part of a message, and of those before it. As integers: operations on enums cost more."""

_READABLE = int(zmq.POLLIN)

logger = logging.getLogger(__name__)


class Transport:
    """All connections of one process.

    ``deliver`` is called with Received and PeerLost events. It must not call the transport before it returns to the
    loop. A peer that sends an undecodable message gets ProtocolViolation, and both ends get PeerLost. After that they
    may go on: what was lost with the message is over for both.
    """

    def __init__(
        self, me: PeerId, deliver: Callable[[object], None], *, send_queue: int = 1000, keys: Keys | None = None
    ) -> None:
        self.me = me
        self._deliver = deliver
        self._send_queue = send_queue
        self._context = zmq.Context()
        self._loop = asyncio.get_running_loop()
        self._router: zmq.Socket[bytes] | None = None
        self._sockets: dict[PeerId, zmq.Socket[bytes]] = {}
        self._lookups: dict[PeerId, asyncio.Task[None]] = {}
        self._held: dict[PeerId, deque[tuple[Message, Sequence[memoryview]]]] = {}
        self._names: dict[zmq.Socket[bytes], PeerId] = {}
        self._keys = keys
        self._authenticator = Authenticator(self._context, keys) if keys is not None else None
        self._peer_names = PeerNames(me)
        self._log_limit = LogLimit()

    # ------------------------------------------------------------ connections

    def bind(self, *addresses: str) -> list[str]:
        """Bind ``addresses`` (``tcp://host:0``: any free port) and return the bound addresses."""
        if self._router is not None:
            raise LocalProtocolError("already bound")
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if self._authenticator is not None:
            self._authenticator.secure_listener(self._router)
        bound = []
        for address in addresses:
            endpoint = listening_address(address)
            self._router.setsockopt(zmq.IPV6, is_ipv6(endpoint))
            self._router.bind(endpoint)
            bound.append(self._router.getsockopt_string(zmq.LAST_ENDPOINT))
        self._watch(self._router)
        return bound

    def bind_private(self, peer: PeerId, address: str) -> None:
        """Bind ``address``, a file that only this user can reach, for one connection: that of ``peer``."""
        pair = self._outgoing(peer, zmq.PAIR)
        pair.bind(address)
        self._watch(pair)

    def connect_private(self, peer: PeerId, address: str) -> None:
        """Connect to ``address``, which ``peer`` has bound with ``bind_private``."""
        pair = self._outgoing(peer, zmq.PAIR)
        pair.connect(address)
        self._watch(pair)

    def connect(self, peer: PeerId, address: str) -> None:
        """Connect to ``address`` under the name ``peer``. Messages sent before it answers are queued."""
        dealer = self._outgoing(peer, zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, self._peer_names.own_routing_id)
        if self._authenticator is not None and self._keys is not None:
            server_key = self._keys.public_of(peer)
            if server_key is None:
                self.disconnect(peer)
                self._lose(peer, f"security.keys has no public key of {key_name(peer)}")
                return
            self._authenticator.secure_connection(dealer, server_key)
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
        self._reach(self._sockets[peer], address, ipv6=ipv6)
        for message, payload in self._held.pop(peer):
            self.send(peer, message, payload)

    def disconnect(self, peer: PeerId) -> None:
        """Drop the outgoing connection to ``peer`` with its queued messages. No effect on incoming connections."""
        lookup = self._lookups.pop(peer, None)
        if lookup is not None:
            lookup.cancel()
        self._held.pop(peer, None)
        dealer = self._sockets.pop(peer, None)
        if dealer is not None:
            self._close(dealer)

    def close(self) -> None:
        """Close every connection. Messages that are not sent within 200 ms are lost."""
        for peer in list(self._lookups):
            self.disconnect(peer)
        for dealer in self._sockets.values():
            self._close(dealer, linger_ms=200)
        self._sockets.clear()
        if self._router is not None:
            self._close(self._router, linger_ms=200)
            self._router = None
        if self._authenticator is not None:
            self._authenticator.close()
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
        head = [encode(message)]
        socket = self._sockets.get(peer)
        if socket is None:
            socket, routing_id = self._router, self._peer_names.routing_id(peer)
            if socket is None or routing_id is None:
                self._lose(peer, "not connected")
                return
            head.insert(0, routing_id)
        try:
            self._send_parts(socket, head, payload)
        except zmq.ZMQError as error:
            self._lose(peer, f"cannot send {type(message).__name__}: {error.strerror}")

    def _send_parts(self, socket: zmq.Socket[bytes], head: list[bytes], payload: Sequence[memoryview]) -> None:
        parts: list[bytes | memoryview] = [*head, *payload]
        for index, part in enumerate(parts, 1):
            socket.send(part, _MORE if index < len(parts) else _LAST, copy=index <= len(head))
        # Sending may swallow the edge that tells of something to read.
        if int(socket.get(zmq.EVENTS)) & _READABLE:
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
                frames = socket.recv_multipart(_LAST, copy=False)
            except zmq.Again:
                return
            if socket is not self._router:
                self._take(self._names[socket], frames)
            elif (peer := self._inbound(frames[0])) is not None:
                self._take(peer, frames[1:])
            if time.monotonic() >= ends_s:
                break
        self._loop.call_soon(self._read, socket)

    def _inbound(self, frame: zmq.Frame) -> PeerId | None:
        """Return the peer whose message came over an incoming connection; None if it may not use that name.

        It may not use the name of one of our own connections, or that of a peer that has another connection or another
        key. Whoever it is learns of it, so that nobody waits for an answer.
        """
        routing_id = frame.bytes
        has_key = self._keys is None or frame.get("User-Id") == key_name(claimed_peer(routing_id))
        peer = self._peer_names.peer(routing_id) if has_key else None
        if peer is not None and peer not in self._sockets:
            return peer
        name = claimed_peer(routing_id)
        reason = f"the name {name} belongs to another {'connection' if has_key else 'key'}"
        self._log_refused(name, reason)
        if self._router is not None:
            with contextlib.suppress(zmq.ZMQError):
                self._send_parts(self._router, [routing_id, encode(ProtocolViolation(reason=reason))], ())
        return None

    def _take(self, peer: PeerId, frames: list[zmq.Frame]) -> None:
        try:
            if not frames:
                raise RemoteProtocolError("empty message")
            encoded = frames[0].bytes
            message = decode(encoded)
        except RemoteProtocolError as error:
            self._log_refused(peer, error.message)
            self.send(peer, ProtocolViolation(reason=error.message))
            self._deliver(PeerLost(peer, error.message))
            return
        if isinstance(message, ProtocolViolation):
            self._log_refused(peer, f"it refuses what we sent: {message.reason}")
            self._deliver(PeerLost(peer, message.reason))
            return
        self._deliver(Received(peer, message, tuple([frame.buffer for frame in frames[1:]]), encoded))

    def _log_refused(self, peer: PeerId, reason: str) -> None:
        if self._log_limit.permits(peer, time.monotonic()):
            logger.error("peer %r: %s", peer, reason)

    # ------------------------------------------------------------ sockets

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, self._send_queue)
        socket.setsockopt(zmq.RCVHWM, self._send_queue)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_PART_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        return socket

    def _outgoing(self, peer: PeerId, kind: int) -> zmq.Socket[bytes]:
        """Return a new socket for ``peer`` alone."""
        if peer in self._sockets:
            raise LocalProtocolError(f"already connected to {peer}")
        socket = self._sockets[peer] = self._socket(kind)
        self._names[socket] = peer
        return socket

    def _watch(self, socket: zmq.Socket[bytes]) -> None:
        self._loop.add_reader(socket.fileno(), self._read, socket)
        self._loop.call_soon(self._read, socket)

    def _close(self, socket: zmq.Socket[bytes], linger_ms: int = 0) -> None:
        self._loop.remove_reader(socket.fileno())
        self._names.pop(socket, None)
        if self._authenticator is not None:
            self._authenticator.release(socket)
        socket.close(linger_ms)
