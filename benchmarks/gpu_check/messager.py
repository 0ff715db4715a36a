"""A messager without ZMQ: the real machine and links in a process of their own, with socket pairs for messages.

``python -m gpu_check.messager NODE_FD PEER_FD`` reads its settings, one line of JSON, from standard input.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from cache_messager.machine import MessagerMachine
from cache_messager.mover import BlockMover
from cache_messager.settings import MessagerSettings
from kvrelay.kv_pool.attach import open_pool
from kvrelay.machine.contract import Exit, Log, PeerLost, Received, Send, SetTimer, Started, TimerFired
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages import base, messager_to_messager, messager_to_node, node_to_messager
from kvrelay.protocol.messages.base import LinkAddress, Message

_MESSAGES = {
    name: item
    for module in (base, messager_to_messager, messager_to_node, node_to_messager)
    for name, item in vars(module).items()
    if isinstance(item, type) and issubclass(item, Message)
}
_HEAD = struct.Struct("!4I")
"""Bytes of the message's name, of its fields, and of its payload: gibibytes and the rest."""


class Wire:
    """One end of a socket pair that carries messages with payload, one after the other."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()

    def send(self, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Send ``message``; from any thread."""
        name, fields = type(message).__name__.encode(), msgspec.msgpack.encode(message)
        num_bytes = sum(part.nbytes for part in payload)
        head = _HEAD.pack(len(name), len(fields), num_bytes >> 30, num_bytes & ((1 << 30) - 1))
        with self._lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader notices
            self._end.sendall(head + name + fields)
            for part in payload:
                self._end.sendall(part)

    def receive(self) -> tuple[Message, tuple[memoryview, ...]] | None:
        """Return the next message and its payload, None when the other end is closed."""
        head = self._read(_HEAD.size)
        if head is None:
            return None
        name_bytes, field_bytes, gibibytes, rest = _HEAD.unpack(head)
        name, fields, payload = (self._read(size) for size in (name_bytes, field_bytes, (gibibytes << 30) + rest))
        if name is None or fields is None or payload is None:
            return None
        message: Message = msgspec.msgpack.decode(fields, type=_MESSAGES[bytes(name).decode()])
        return message, (payload,) if payload.nbytes else ()

    def _read(self, size: int) -> memoryview | None:
        data = memoryview(bytearray(size))
        done = 0
        while done < size:
            try:
                count = self._end.recv_into(data[done:])
            except OSError:  # reset, or closed at this end
                count = 0
            if not count:
                return None
            done += count
        return data

    def close(self) -> None:
        """Close this end."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()


class Messager:
    """Runs one machine until its node's end is closed. ``wires`` are those of the node and of the other messager."""

    def __init__(self, settings: MessagerSettings, wires: dict[str, Wire]) -> None:
        self._settings = settings
        self._wires = wires
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._handlers: dict[type, Callable[[Any], None]] = {}
        self._timers: dict[Hashable, float] = {}
        self._is_over = False
        self._pool = open_pool(settings.geometry, settings.pool)
        self._mover = BlockMover(settings, self._pool)
        link = LinkAddress(peer=settings.me, host_id="host", tcp=f"tcp://{settings.me}", ipc=f"ipc://{settings.me}")
        self._machine = MessagerMachine(settings, link, self._mover.offers)
        self._mover.serve(self, self)

    # ------------------------------------------------------------ what a mover needs

    def handle_with(self, kind: type, handler: Callable[[Any], None]) -> None:
        self._handlers[kind] = handler

    def send(self, peer: str, message: Message, payload: Sequence[memoryview] = ()) -> None:
        self._wires["node" if peer == self._settings.node else "peer"].send(message, payload)

    def post(self, event: object) -> None:
        self._queue.put(event)

    def call_threadsafe(self, call: Callable[[], None]) -> None:
        self._queue.put(call)

    # ------------------------------------------------------------ the loop

    def run(self) -> None:
        """Serve until the machine says so."""
        for name in self._wires:
            threading.Thread(target=self._listen, args=(name,), daemon=True).start()
        self._handle(Started())
        while not self._is_over:
            try:
                item = self._queue.get(timeout=self._seconds_to_timer())
            except Empty:
                self._fire()
                continue
            if callable(item):
                item()
            else:
                self._handle(item)
            self._fire()
        self._mover.close()
        self._pool.close()

    def _listen(self, name: str) -> None:
        wire, other = self._wires[name], self._settings.node
        if name == "peer":
            other = PeerId("d0.messager#1" if self._settings.me.startswith("p0") else "p0.messager#1")
        while (received := wire.receive()) is not None:
            self._queue.put(Received(other, *received))
        self._queue.put(PeerLost(other, "its end is closed"))

    def _handle(self, event: Any) -> None:
        for action in self._machine.handle(event, time.time()):
            match action:
                case Send(peer=peer, message=message):
                    self.send(peer, message)
                case SetTimer(key=key, at_s=at_s):
                    self._timers[key] = at_s
                case Log(level=level, event=what, fields=fields) if level != "info":
                    print(f"# {self._settings.me}: {what} {fields}", file=sys.stderr, flush=True)
                case Exit():
                    self._is_over = True
                case _ if type(action) in self._handlers:
                    self._handlers[type(action)](action)

    def _seconds_to_timer(self) -> float:
        return max(0.0, min(self._timers.values(), default=time.time() + 1) - time.time())

    def _fire(self) -> None:
        for key in [key for key, at_s in self._timers.items() if at_s <= time.time()]:
            del self._timers[key]
            self._handle(TimerFired(key))


def main() -> None:
    """Serve one node."""
    node, peer = (Wire(socket.socket(fileno=int(number))) for number in sys.argv[1:3])
    settings = msgspec.json.decode(sys.stdin.readline(), type=MessagerSettings)
    Messager(settings, {"node": node, "peer": peer}).run()


if __name__ == "__main__":
    main()
