"""Messages over ZMQ: one ROUTER to be reached at, one DEALER to each process we reach out to.

Nothing here blocks. A message that cannot be queued at once makes its peer lost: whoever does not read for a thousand
messages is not there for us, and the machine that sent it must know.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq

from kvrelay.addresses import is_ipv6
from kvrelay.errors import LocalProtocolError, RemoteProtocolError
from kvrelay.machine.contract import PeerLost, Received
from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message, ProtocolViolation

MAX_PART_BYTES = 64 << 20
"""Longest part of a message that is read from the wire at all; ZMQ drops the connection that sends more."""

_READS_PER_TURN = 64
_MAX_MUTED = 1024

logger = logging.getLogger(__name__)


class Transport:
    """All connections of one process.

    ``deliver`` gets Received and PeerLost events; it must not call back into the transport before it returns to the
    loop. A peer that sends what cannot be read is told so and not listened to again.
    """

    def __init__(self, me: PeerId, deliver: Callable[[object], None], *, send_queue: int = 1000) -> None:
        self.me = me
        self._deliver = deliver
        self._send_queue = send_queue
        self._context = zmq.Context()
        self._loop = asyncio.get_running_loop()
        self._router: zmq.Socket[bytes] | None = None
        self._dealers: dict[PeerId, zmq.Socket[bytes]] = {}
        self._names: dict[zmq.Socket[bytes], PeerId] = {}
        self._muted: dict[PeerId, None] = {}
        self._aliases: dict[PeerId, PeerId] = {}
        self._aliased: dict[PeerId, PeerId] = {}

    # ------------------------------------------------------------ connections

    def bind(self, *addresses: str) -> list[str]:
        """Listen at ``addresses`` (``tcp://host:0`` takes any free port) and return where that is."""
        if self._router is not None:
            raise LocalProtocolError("already bound")
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        bound = []
        for address in addresses:
            self._router.setsockopt(zmq.IPV6, is_ipv6(address))
            self._router.bind(address)
            bound.append(self._router.getsockopt_string(zmq.LAST_ENDPOINT))
        self._watch(self._router)
        return bound

    def connect(self, peer: PeerId, address: str) -> None:
        """Reach out to ``address`` and call what is there ``peer``. What is sent before it answers is queued."""
        if peer in self._dealers:
            raise LocalProtocolError(f"already connected to {peer}")
        dealer = self._socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, self.me.encode())
        dealer.setsockopt(zmq.IPV6, is_ipv6(address))
        dealer.connect(address)
        self._dealers[peer] = dealer
        self._names[dealer] = peer
        self._watch(dealer)

    def alias(self, name: PeerId, peer: PeerId) -> None:
        """Call ``peer``, who reaches out to us, ``name`` from here on."""
        self._aliases[peer], self._aliased[name] = name, peer

    def disconnect(self, peer: PeerId) -> None:
        """Drop the connection to ``peer`` with all that is queued. Of a peer that reached out to us nothing is kept."""
        dealer = self._dealers.pop(peer, None)
        if dealer is not None:
            self._close(dealer)

    def close(self) -> None:
        """Close every connection; what the kernel does not have yet is lost after a short linger."""
        for dealer in self._dealers.values():
            self._close(dealer, linger_ms=200)
        self._dealers.clear()
        if self._router is not None:
            self._close(self._router, linger_ms=200)
            self._router = None
        self._context.term()

    # ------------------------------------------------------------ sending

    def send(self, peer: PeerId, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Queue ``message`` and raw parts after it. Parts are not copied: they must stay as they are until answered."""
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
        for _ in range(_READS_PER_TURN):
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
        self._loop.call_soon(self._read, socket)

    def _inbound(self, identity: bytes) -> PeerId | None:
        """Return who reaches out to us as ``identity``; None if that is the name of a connection we made ourselves."""
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
            logger.error("peer %s could not read a message of ours: %s", peer, message.reason)
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
