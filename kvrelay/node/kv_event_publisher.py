"""Publishes KV events on ZMQ sockets, as vLLM does: a PUB socket for all, and a ROUTER socket that repeats old ones.

A thread sends, so that nothing a subscriber does reaches the node's loop. PUB drops what a slow subscriber does not
take; it sees a gap in the sequence numbers and can ask for a replay.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import msgspec
import zmq

from kvrelay.addresses import is_loopback, split_tcp_address
from kvrelay.config.kv_events import KVEventsConfig
from kvrelay.errors import ConfigError
from kvrelay.machine.contract import PublishKVEvents
from kvrelay.protocol.kv_events import KVEventBatch

logger = logging.getLogger(__name__)

MAX_QUEUED_BATCHES = 10_000
"""Batches that wait for the thread. Beyond, new ones are dropped, which leaves a gap in the sequence numbers."""

MAX_BUFFER_BYTES = 64 << 20
"""Memory for batches that can be replayed."""

MAX_REPLAYS = 4
"""Replays in progress. More requests wait in their socket."""

MAX_REQUESTS_AT_ONCE = 8
"""Requests for replays, valid or not, that are read before the next pause."""

REQUEST_PAUSE_S = 0.05
"""Seconds after a request in which no other is read: a flood of them costs the node next to nothing."""

REPLAY_TIMEOUT_S = 5.0
"""Seconds without progress after which a replay is given up: its client does not read."""

REPLAY_END = (-1).to_bytes(8, "big", signed=True)
"""Sequence number of the message that ends a replay."""

_REPLAY_SLICE = 64
"""Replayed batches between two looks at new ones."""

_LINGER_MS = 200
"""At the end, for subscribers to take what they have not taken yet."""

_POLL_MS = 200
_BUSY_POLL_MS = 5


class KVEventPublisher:
    """Publishes from construction to the end of the context. ``publish`` may be called from one thread."""

    def __init__(self, key: str, config: KVEventsConfig, topic: str) -> None:
        """``key`` names the config in errors. Raises ConfigError if an address cannot be bound."""
        self._topic = (config.topic or topic).encode()
        self._pending: deque[tuple[int, PublishKVEvents]] = deque()
        self._next_number = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = False
        self._context = zmq.Context()
        assert config.endpoint is not None
        try:
            self._pub = self._bound(zmq.PUB, f"{key}.endpoint", config.endpoint, config.hwm)
            replay = config.replay_endpoint
            self._replays = _Replays(
                None if replay is None else self._bound(zmq.ROUTER, f"{key}.replay_endpoint", replay, config.hwm),
                config.buffer_batches,
            )
        except ConfigError:
            self._context.destroy(linger=0)
            os.close(self._wake)
            raise
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)

    def _bound(self, kind: int, key: str, address: str, hwm: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(hwm)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, address.startswith("tcp://["))
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.MAXMSGSIZE, 4096)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError([f"{key}: cannot listen at {address}: {error.strerror}"]) from error
        if not is_loopback(split_tcp_address(address)[0]):
            logger.warning("%s: whoever reaches %s can read the tokens of all prompts", key, address)
        return socket

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._context.destroy(linger=_LINGER_MS)
        os.close(self._wake)

    def publish(self, action: PublishKVEvents) -> None:
        """Have the thread publish a batch. Never waits."""
        number = self._next_number
        self._next_number += 1
        if len(self._pending) < MAX_QUEUED_BATCHES:
            self._pending.append((number, action))
            os.eventfd_write(self._wake, 1)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        encoder = msgspec.msgpack.Encoder()
        while True:
            is_last = self._stopping  # looked at before the queue: what was published before the end is sent
            try:
                self._send_pending(encoder)
                if is_last:
                    return
                now = time.monotonic()
                self._replays.serve(now)
                self._replays.register(poller, now)
                poller.poll(self._replays.poll_ms(now))
                self._clear_wake()
            except Exception:
                logger.exception("error while publishing KV events")
                if is_last:
                    return
                time.sleep(_POLL_MS / 1000)

    def _clear_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return

    def _send_pending(self, encoder: msgspec.msgpack.Encoder) -> None:
        while self._pending:
            number, action = self._pending.popleft()
            payload = encoder.encode(KVEventBatch(action.at_s, list(action.events)))
            sequence = number.to_bytes(8, "big")
            self._replays.keep(number, payload)
            self._pub.send_multipart((self._topic, sequence, payload))


class _Replays:
    """The last batches, and the clients that get them again. ``socket``: None without replays."""

    def __init__(self, socket: zmq.Socket[bytes] | None, max_batches: int) -> None:
        self._socket = socket
        self._max_batches = max_batches
        self._kept: deque[tuple[int, bytes]] = deque()
        self._num_bytes = 0
        self._running: dict[bytes, _Replay] = {}
        self._reads_after_s = 0.0
        self._is_registered = False

    def poll_ms(self, now: float) -> int:
        """Return after how many milliseconds there is something to do, whether or not a socket is readable."""
        if self._running:
            return _BUSY_POLL_MS
        pause_ms = math.ceil(1000 * (self._reads_after_s - now))
        return pause_ms if pause_ms > 0 else _POLL_MS

    def register(self, poller: zmq.Poller, now: float) -> None:
        """Have ``poller`` look for requests, unless there are as many replays as may be, or a pause."""
        if self._socket is None:
            return
        wanted = len(self._running) < MAX_REPLAYS and now >= self._reads_after_s
        if wanted and not self._is_registered:
            poller.register(self._socket, zmq.POLLIN)
        elif self._is_registered and not wanted:
            poller.unregister(self._socket)
        self._is_registered = wanted

    def keep(self, number: int, payload: bytes) -> None:
        """Keep a batch, and drop the oldest beyond the limits."""
        if self._socket is None:
            return
        self._kept.append((number, payload))
        self._num_bytes += len(payload)
        while self._kept and (len(self._kept) > self._max_batches or self._num_bytes > MAX_BUFFER_BYTES):
            self._num_bytes -= len(self._kept.popleft()[1])

    def serve(self, now: float) -> None:
        """Take requests, and send each client its next batches."""
        if self._socket is None:
            return
        if now >= self._reads_after_s:
            self._read_requests(self._socket, now)
        for client, replay in list(self._running.items()):
            if replay.send(self._socket, now):
                del self._running[client]

    def _read_requests(self, socket: zmq.Socket[bytes], now: float) -> None:
        for _ in range(MAX_REQUESTS_AT_ONCE):
            if len(self._running) >= MAX_REPLAYS or not socket.poll(0):
                return
            self._begin(socket.recv_multipart(zmq.NOBLOCK), now)
            self._reads_after_s = now + REQUEST_PAUSE_S

    def _begin(self, frames: list[bytes], now: float) -> None:
        if len(frames) != 3 or len(frames[2]) != 8:
            return
        client, _, first = frames
        number = int.from_bytes(first, "big")
        self._running[client] = _Replay(client, [kept for kept in self._kept if kept[0] >= number], now)


class _Replay:
    """The batches that one client asked for again."""

    def __init__(self, client: bytes, batches: list[tuple[int, bytes]], now: float) -> None:
        self._client = client
        self._messages = self._all(batches)
        self._next: tuple[bytes, bytes] | None = next(self._messages)
        self._progress_s = now

    @staticmethod
    def _all(batches: list[tuple[int, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for number, payload in batches:
            yield number.to_bytes(8, "big"), payload
        yield REPLAY_END, b""

    def send(self, socket: zmq.Socket[bytes], now: float) -> bool:
        """Send a slice; return whether the replay is over, or given up."""
        for _ in range(_REPLAY_SLICE):
            if self._next is None:
                return True
            try:
                socket.send_multipart((self._client, b"", *self._next), zmq.NOBLOCK)
            except zmq.Again:
                return now - self._progress_s > REPLAY_TIMEOUT_S
            except zmq.ZMQError:  # the client has left
                return True
            self._progress_s = now
            self._next = next(self._messages, None)
        return self._next is None
