"""Admits connections with known keys to the sockets of one ZMQ context (ZAP, RFC 27) and logs those refused."""

from __future__ import annotations

import asyncio
import logging
import time

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from kvrelay.machine.log_limit import LogLimit
from kvrelay.runtime.keys import Keys

DOMAIN = b"kvrelay"
HANDSHAKE_MS = 10_000
"""Maximum duration of a handshake. A connection that takes longer is closed."""

_ADDRESS = "inproc://zeromq.zap.01"
_REFUSED = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH

logger = logging.getLogger(__name__)


class Authenticator:
    """Secures the sockets of ``context`` with ``keys``.

    A connection is admitted if its key is one of ``keys.public``. Its messages then have the property ``User-Id``, the
    name of that key.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys) -> None:
        self._keys = keys
        self._loop = asyncio.get_running_loop()
        self._log_limit = LogLimit()
        self._monitors: dict[zmq.Socket[bytes], zmq.Socket[bytes]] = {}
        self._requests = context.socket(zmq.REP)
        self._requests.setsockopt(zmq.LINGER, 0)
        self._requests.bind(_ADDRESS)
        self._loop.add_reader(self._requests.fileno(), self._answer)

    # ------------------------------------------------------------ sockets

    def secure_listener(self, socket: zmq.Socket[bytes]) -> None:
        """Admit only known keys to ``socket``. Before it is bound."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        self._monitor(socket, "a connection was refused at")

    def secure_connection(self, socket: zmq.Socket[bytes], server_key: bytes) -> None:
        """Let ``socket`` connect only to the process with the public key ``server_key``. Before it is connected."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.own_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        self._monitor(socket, "keys do not fit, or there are none, at")

    def release(self, socket: zmq.Socket[bytes]) -> None:
        """Forget ``socket``, before it is closed."""
        monitor = self._monitors.pop(socket, None)
        if monitor is not None:
            socket.disable_monitor()
            self._loop.remove_reader(monitor.fileno())
            monitor.close(0)

    def close(self) -> None:
        """Admit nobody any more. All sockets are released."""
        self._loop.remove_reader(self._requests.fileno())
        self._requests.close()

    # ------------------------------------------------------------ connections

    def _answer(self) -> None:
        """Answer all requests that wait: may this key connect?"""
        while True:
            try:
                version, request_id, _, address, _, mechanism, *credentials = self._requests.recv_multipart(
                    zmq.DONTWAIT
                )
            except zmq.Again:
                return
            name = self._keys.owner(z85.encode(credentials[0])) if mechanism == b"CURVE" and credentials else None
            if name is None:
                self._log(address.decode("utf-8", "replace"), "a connection with an unknown key was refused from")
            status, text, user = (b"400", b"unknown key", b"") if name is None else (b"200", b"OK", name.encode())
            self._requests.send_multipart([version, request_id, status, text, user, b""], zmq.DONTWAIT)

    def _monitor(self, socket: zmq.Socket[bytes], text: str) -> None:
        monitor = socket.get_monitor_socket(_REFUSED)
        self._monitors[socket] = monitor
        self._loop.add_reader(monitor.fileno(), self._read_monitor, monitor, text)
        self._loop.call_soon(self._read_monitor, monitor, text)

    def _read_monitor(self, monitor: zmq.Socket[bytes], text: str) -> None:
        while not monitor.closed:
            try:
                event = parse_monitor_message(monitor.recv_multipart(zmq.DONTWAIT))
            except zmq.Again:
                return
            self._log(event["endpoint"].decode("utf-8", "replace"), text)

    def _log(self, where: str, text: str) -> None:
        if self._log_limit.permits((where, text), time.monotonic()):
            logger.error("%s %s", text, where)
