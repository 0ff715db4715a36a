"""The connection between the router and one worker: a pair of sockets without a name, so that nobody else can reach it.

A frame is its length in four bytes, little-endian, and a MessagePack list of messages. All messages of one turn of the
loop go into one frame, unless they are very many or long: the tokens of a step are one frame per worker.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import msgspec

from kvrelay.protocol.token_rules import TokenRules
from kvrelay.runtime.time_slice import MAX_TIME_SLICE_S
from router.events import NewRequest
from router.workers.messages import Submission, WorkerMessage

LENGTH = struct.Struct("<I")

MAX_WEIGHT = 1 << 15
"""Tokens after which a frame ends: to decode them takes about a millisecond."""

_WEIGHT = 128
"""What every message weighs, besides its tokens."""

MAX_UNSENT_BYTES = 64 << 20
"""Bytes that the other end has not read after which it is taken to hang."""

_encoder = msgspec.msgpack.Encoder()


def weights(requests: Iterable[NewRequest]) -> Iterator[int]:
    """Yield how many tokens are in each of ``requests``: of its prompt, and those that its sampling params name.

    Choices of one answer share their bad words, which are counted once.
    """
    rules: TokenRules | None = None
    num_banned = 0
    for request in requests:
        params = request.sampling
        if params.token_rules is not rules:
            rules = params.token_rules
            bad_words = None if rules is None else rules.bad_words
            num_banned = 0 if bad_words is None else sum(1 for _ in bad_words.token_ids())
        yield len(request.prompt_token_ids) + len(params.logit_bias) + len(params.stop_token_ids) + num_banned


def weight(message: WorkerMessage) -> int:
    """Return about how many tokens as long ``message`` takes to encode and decode."""
    return _WEIGHT + (sum(weights(message.requests)) if isinstance(message, Submission) else 0)


def take_batch(waiting: deque[WorkerMessage]) -> list[WorkerMessage]:
    """Take the messages of the next frame: at least one, then until they weigh ``MAX_WEIGHT``."""
    batch: list[WorkerMessage] = []
    total = 0
    while waiting and total < MAX_WEIGHT:
        message = waiting.popleft()
        total += weight(message)
        batch.append(message)
    return batch


class Channel(asyncio.Protocol):
    """One end. ``incoming``: the union of the messages that come; ``receive`` takes each."""

    def __init__(self, incoming: Any, receive: Callable[[Any], None]) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[incoming])
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[WorkerMessage] = deque()
        self._flushed = asyncio.Event()
        self._flushed.set()
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()
        """Set when the other end has closed the connection, or its process has ended."""

    async def open(self, end: socket.socket) -> None:
        """Use this end of the pair. Messages may come before this returns."""
        await self._loop.create_unix_connection(lambda: self, sock=end)

    @property
    def num_unsent_bytes(self) -> int:
        """Bytes that wait in this process until the other end has read others."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def send(self, message: WorkerMessage) -> None:
        """Send ``message`` with the others of this turn of the loop; nothing if the channel is lost."""
        self._waiting.append(message)
        if self._flushed.is_set():
            self._flushed.clear()
            self._loop.call_soon(self._flush)

    async def close(self) -> None:
        """Send what waits, close the channel and return when the other end has read it or has ended."""
        await self._flushed.wait()
        if self._transport is not None:
            self._transport.close()
        await self.lost.wait()

    def abort(self) -> None:
        """Close the channel at once."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        """Write frames for ``MAX_TIME_SLICE_S`` at most."""
        ends_s = time.monotonic() + MAX_TIME_SLICE_S
        while self._waiting:
            body = _encoder.encode(take_batch(self._waiting))
            if self._transport is not None:
                self._transport.writelines((LENGTH.pack(len(body)), body))
            if time.monotonic() >= ends_s:
                self._loop.call_soon(self._flush)
                return
        self._flushed.set()

    # ------------------------------------------------------------ called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._transport = None
        self.lost.set()

    def data_received(self, data: bytes) -> None:
        """Pass on the messages of the frames that are complete."""
        self._received += data
        start = 0
        while (frame := self._next_frame(start)) is not None:
            body, start = frame
            for message in self._decoder.decode(body):
                self._receive(message)
        del self._received[:start]

    def _next_frame(self, start: int) -> tuple[bytearray, int] | None:
        """Return the body of the frame that begins at ``start``, and its end; None if it is not complete."""
        begin = start + LENGTH.size
        if len(self._received) < begin:
            return None
        (length,) = LENGTH.unpack_from(self._received, start)
        if len(self._received) < begin + length:
            return None
        return self._received[begin : begin + length], begin + length
