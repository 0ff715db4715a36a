"""HTTP/1 connections: uvicorn's, with limits on sizes and times."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec
from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from kvrelay.machine.log_limit import LogLimit
from kvrelay.protocol.messages.base import ErrorInfo
from router.descriptors import Descriptors
from router.http.asgi import CONNECTION
from router.http.error_format import error_body
from router.openai.errors import AnswerError

LINGER_S = 1.0
"""Seconds for which a refused client may still send. Closing immediately would reset the connection."""

MAX_PIPELINED = 64
"""Unanswered requests of one connection. uvicorn stops reading at the second, but one read may have thousands."""

FIRST_PROBE_S = 1.0
"""Seconds before a client that has half-closed the connection is probed."""

_READ_S = 0.001
"""Seconds until a timer that the loop can only call after it has read from all connections."""

_TCP_CLOSE = 7
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_WITHOUT_BODY = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
_CONTROL_CHARACTER = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

logger = logging.getLogger(__name__)

_connection_logger = logging.getLogger(f"{__name__}.connection")
"""uvicorn's own, without its warnings: a line for each invalid request lets clients fill the log."""

_connection_logger.setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of one connection; see the ``router`` section of the config."""

    max_header_bytes: int = 64 << 10
    request_read_timeout_s: float = 60.0
    keep_alive_timeout_s: float = 75.0
    descriptors: Descriptors = field(default_factory=Descriptors)
    log_limit: LogLimit = field(default_factory=LogLimit)


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    Bytes are counted from the last that was part of a body, so one limit holds for headers, trailers and whatever else
    a client puts between chunks. A request has one deadline, from its first byte to its last; if the router has paused
    reading before it, the client gets another.
    """

    def __init__(self, *args: Any, limits: HttpLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _connection_logger
        self.timeout_keep_alive = limits.keep_alive_timeout_s  # type: ignore[assignment]  # any number of seconds
        self._limits = limits
        self._num_bytes = 0
        self._is_receiving = False
        self._was_paused = False
        self._is_refused = False
        self._is_last = False
        self._deadline: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None
        self._watchers: set[Callable[[], None]] = set()
        self._is_lost = False
        self._unanswered: list[RequestResponseCycle] = []
        """The last request, and those before it that were not answered when it came."""

    # ------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request. Refuse the client if there are too few file descriptors."""
        super().connection_made(transport)
        self._expect_request()
        descriptor = transport.get_extra_info("socket").fileno()
        if not self._limits.descriptors.allow(descriptor):
            self._refuse(503, "too_many_connections", "the router has too many connections; try again later")
            if self._limits.descriptors.is_urgent(descriptor):
                transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all timers, and forget all requests, which refer to the connection: a cycle would be garbage."""
        for timer in (self._deadline, self._probe):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        self._give_up_answers()
        super().connection_lost(exc)
        self.cycle = self.scope = None  # type: ignore[assignment]
        self._unanswered = []
        self.pipeline.clear()
        self._is_lost = True
        self._tell_watchers()

    def finish(self, idle_s: float) -> None:
        """Close the connection after the next answer that can say so, or when it has been idle for ``idle_s``.

        An answer that has begun and has not said so is not that: its client may use the connection again at once.
        """
        if self._is_last:
            return
        self._is_last = True
        self.timeout_keep_alive = min(self.timeout_keep_alive, idle_s)  # type: ignore[assignment]  # see above
        if self._is_answering:
            self.cycle.keep_alive = self.cycle.keep_alive and self.cycle.response_started
        elif self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
            self._expect_request()

    def watch(self, on_disconnect: Callable[[], None]) -> None:
        """Call ``on_disconnect`` when the client disconnects, at once if it has."""
        self._watchers.add(on_disconnect)
        if self._is_lost:
            self._tell_watchers()
        else:
            self.flow.resume_reading()  # a connection that is not read does not tell of its end

    def unwatch(self, on_disconnect: Callable[[], None]) -> None:
        """Do not call it any more."""
        self._watchers.discard(on_disconnect)

    def _tell_watchers(self) -> None:
        watchers, self._watchers = self._watchers, set()
        for on_disconnect in watchers:
            on_disconnect()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection if a complete request has arrived, because the client may have only half-closed it."""
        is_tls = self.transport.get_extra_info("ssl_object") is not None  # TLS has no half-closed connections
        if is_tls or self._is_refused or self._is_receiving or not self._is_answering:
            return False
        self.cycle.keep_alive = False
        self._probe = self.loop.call_later(FIRST_PROBE_S, self._probe_client, FIRST_PROBE_S)
        return True

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # ------------------------------------------------------------ what comes in

    def data_received(self, data: bytes) -> None:
        """Pass data to the parser in pieces of at most the header limit."""
        while data and not self._is_refused and not self.transport.is_closing():
            room = self._limits.max_header_bytes - self._num_bytes
            if room <= 0:
                self._refuse(431, "headers_too_large", f"headers exceed {self._limits.max_header_bytes} bytes")
                return
            piece, data = data[:room], data[room:]
            self._num_bytes += len(piece)
            super().data_received(piece)
        self._was_paused |= self.flow.read_paused
        if not self._is_refused:
            self._watch_progress()

    def on_message_begin(self) -> None:
        """Called when a request starts. Raises HttpParserError, which ends the connection, after too many."""
        if len(self._unanswered) >= MAX_PIPELINED and len(self._being_answered()) >= MAX_PIPELINED:
            raise HttpParserError(f"more than {MAX_PIPELINED} unanswered requests")
        self._is_receiving = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called when the headers are complete."""
        self._num_bytes = 0
        super().on_headers_complete()
        self.cycle.__class__ = Cycle
        if self._is_last:
            self.cycle.keep_alive = False
        self.cycle.linger = self.linger  # type: ignore[attr-defined]
        self._unanswered = [*self._being_answered(), self.cycle]
        self.scope[CONNECTION] = self  # type: ignore[literal-required]

    def on_body(self, body: bytes) -> None:
        """Called for a part of the body."""
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called when a request is complete."""
        self._num_bytes = 0
        self._is_receiving = False
        super().on_message_complete()

    # ------------------------------------------------------------ time

    def _watch_progress(self) -> None:
        """Set the deadline of a request that is being received, else the idle timeout."""
        if self._is_receiving:
            if self._deadline is None:
                self._deadline = self.loop.call_later(self._limits.request_read_timeout_s, self._overdue)
            return
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if not self._is_answering and self.timeout_keep_alive_task is None:
            self._expect_request()

    def _expect_request(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Called when the connection has been idle for too long: by the clock, which may have gone on without the loop.

        So what has come meanwhile is read first.
        """
        self.timeout_keep_alive_task = self.loop.call_later(_READ_S, self._close_idle)

    def _close_idle(self) -> None:
        super().timeout_keep_alive_handler()
        if self._is_last and self.transport.get_extra_info("ssl_object") is not None:
            self._deadline = self.loop.call_later(LINGER_S, self._abort_idle)

    def _abort_idle(self) -> None:
        """TLS waits for the client to close its side too, which one that does not read does not."""
        if self.transport.get_write_buffer_size():
            self._deadline = self.loop.call_later(LINGER_S, self._abort_idle)
        else:
            self.transport.abort()

    def _overdue(self) -> None:
        """The deadline of a request passed. Ignored if the router paused reading before it, or is still answering."""
        self._deadline = None
        was_paused, self._was_paused = self._was_paused, self.flow.read_paused
        if was_paused or (self._is_answering and not self.cycle.more_body):
            self._watch_progress()
        else:
            limit = f"{self._limits.request_read_timeout_s:g} s (router.request_read_timeout_s)"
            self._refuse(408, "request_timeout", f"the request was not complete within {limit}")

    def _probe_client(self, waited_s: float) -> None:
        """Probe a half-closed client. If it has disconnected, its host resets the connection.

        The question is an interim answer. Clients of HTTP/1.1 skip those; clients of 1.0 do not, and are not asked.
        """
        if self.transport.is_closing() or not self._is_answering:
            return
        if _is_reset(self.transport):
            self.transport.abort()
            return
        if not self.cycle.response_started and self.scope.get("http_version") != "1.0":
            self.transport.write(_CONTINUE)
        self._probe = self.loop.call_later(FIRST_PROBE_S, self._look_for_reset, 2 * waited_s)

    def _look_for_reset(self, wait_s: float) -> None:
        if not self.transport.is_closing() and _is_reset(self.transport):
            self.transport.abort()
        else:
            self._probe = self.loop.call_later(wait_s, self._probe_client, wait_s)

    # ------------------------------------------------------------ refusals

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP, and log it once a minute for each client."""
        host = self.client[0] if self.client else "unknown"
        if self._limits.log_limit.permits(host, self.loop.time()):
            logger.warning("invalid HTTP from %s", host)
        self._refuse(400, "invalid_http", msg)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Send an answer, unless the application has begun to, and close the connection."""
        self._is_refused = True
        answering = self._being_answered()
        if answering:
            self._give_up_answers()
            self._tell_watchers()
            if len(answering) > 1 or answering[0].response_started or not answering[0].more_body:
                self.transport.close()
                return
        error = AnswerError(ErrorInfo(code=code, message=message, http_status=status))
        self.transport.write(_raw_answer(error, self.scope.get("path", "") if self.scope else ""))
        self.linger()

    def _being_answered(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._unanswered if not cycle.response_complete]

    def _give_up_answers(self) -> None:
        """Tell the application that nobody waits for its answers. uvicorn tells it of the last request only."""
        for cycle in self._being_answered():
            cycle.disconnected = True
            cycle.waiting_for_100_continue = False  # or it is written to a connection that has been ended
            cycle.message_event.set()

    def linger(self) -> None:
        """Close the connection of a client that may still send, in a way that lets it read its answer."""
        self._is_refused = True
        self._unset_keepalive_if_required()
        if self._deadline is not None:
            self._deadline.cancel()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.close)


class Cycle(RequestResponseCycle):
    """A request and its answer, which may end the connection before the request is here.

    The head of an answer waits for the first part of the body, so that both cost one system call. A client of HTTP/1.0
    knows no chunks: a stream ends with the connection. Answers to HEAD, and those with status 204 or 304, have no body.
    """

    linger: Callable[[], None]
    _head = b""
    _num_missing: int | None = None
    """Bytes that are still to come of a body with a content-length."""

    async def send(self, message: Any) -> None:
        """Send a part of the answer. Raises RuntimeError if it does not follow from the parts before."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.start":
            self._begin(message["status"], message["headers"])
        else:
            self._send_body(message["body"], is_last=not message.get("more_body", False))

    def _begin(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        if self.response_started:
            raise RuntimeError("the answer has begun")
        self.response_started = True
        self.waiting_for_100_continue = False
        lines = [b"%b: %b" % header for header in headers]
        given = dict(headers)
        if b"connection" in given:
            self.keep_alive = False
        elif not self.keep_alive:
            lines.append(b"connection: close")
        if self.scope["method"] == "HEAD" or status in _WITHOUT_BODY:
            self._num_missing = 0
        elif b"content-length" in given:
            self._num_missing = int(given[b"content-length"])
        elif self.scope["http_version"] != "1.0":
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked")
        if _CONTROL_CHARACTER.search(b" ".join(lines)):
            raise RuntimeError("a header has a control character")
        self._head = STATUS_LINE[status] + b"\r\n".join([*lines, b"", b""])

    def _send_body(self, body: bytes, *, is_last: bool) -> None:
        if self.response_complete or not self.response_started:
            raise RuntimeError("the answer has not begun, or it is complete")
        if self.chunked_encoding:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body = chunk + b"0\r\n\r\n" if is_last else chunk
        elif self.scope["method"] == "HEAD":
            body = b""
        if self._num_missing is not None:
            self._num_missing -= len(body)
            if self._num_missing < 0 or (is_last and self._num_missing):
                raise RuntimeError("the answer is not as long as its content-length")
        data, self._head = self._head + body, b""
        if data:
            self.transport.write(data)
        if is_last:
            self._complete()

    def _complete(self) -> None:
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive and not self.more_body:
            self.transport.close()
        self.on_response()
        if not self.keep_alive and not self.transport.is_closing():
            self.linger()


def _is_reset(transport: asyncio.Transport) -> bool:
    state: bytes = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return state[0] == _TCP_CLOSE


def _raw_answer(error: AnswerError, path: str) -> bytes:
    content = msgspec.json.encode(error_body(error, path))
    phrase = HTTPStatus(error.status).phrase
    head = f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + content
