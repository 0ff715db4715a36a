"""The shell of every role: passes events from sockets, timers and threads to a machine and performs its actions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import (
    CancelTimer,
    Connect,
    Disconnect,
    DumpWritten,
    Exit,
    Log,
    Machine,
    Ready,
    Received,
    Resumed,
    Send,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
    WriteDump,
)
from kvrelay.machine.liveness import TICK_S, Pauses
from kvrelay.runtime.dumps import Dumps
from kvrelay.runtime.logging import log_event
from kvrelay.runtime.startup import READY, startup
from kvrelay.runtime.stop_signals import StopRequests, handle_stop_signals
from kvrelay.runtime.time_slice import MAX_TIME_SLICE_S
from kvrelay.runtime.transport import Transport

logger = logging.getLogger(__name__)

Handler = Callable[[Any], None]
"""Performs one kind of action."""


class Shell:
    """Runs one machine on the running loop.

    ``handlers`` perform the actions that a role adds to the core ones, by type. Each event is handled completely before
    the next. Events posted meanwhile are queued. The loop runs other tasks between the actions of a long event. After a
    time in which this process did not run, the machine gets Resumed first. ``dumps`` records what is handled, and
    writes it to a file when an event cannot be handled.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        clock: Clock,
        dumps: Dumps | None = None,
        handlers: Mapping[type, Handler] | None = None,
    ) -> None:
        self._dumps = dumps
        self._handle = machine.handle if dumps is None else dumps.recorded(machine.handle)
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._events: deque[object] = deque()
        self._actions: Iterator[object] | None = None
        self._running = False
        self._listening = False
        self._stop_requests = StopRequests()
        self._pauses = Pauses(clock.now())
        self._ticking: asyncio.TimerHandle | None = None
        self._timers: dict[Hashable, asyncio.TimerHandle] = {}
        self._writing: set[asyncio.Task[None]] = set()
        self._done: asyncio.Future[str] = self._loop.create_future()
        self._handlers: dict[type, Handler] = {
            SetTimer: self._set_timer,
            CancelTimer: self._cancel_timer,
            Log: lambda action: log_event(action.level, action.event, action.fields),
            Ready: lambda _: startup.report(READY),
            Exit: self._exit,
            **(handlers or {}),
        }
        if dumps is not None:
            self._handlers[WriteDump] = lambda action: self._write_dump(dumps, action)

    def handle_with(self, kind: type, handler: Handler) -> None:
        """Let ``handler`` perform actions of type ``kind``. For handlers that need the shell themselves."""
        self._handlers[kind] = handler

    def post(self, event: object) -> None:
        """Queue ``event``. Call from the loop's thread. Events posted before ``run`` are handled by it."""
        self._events.append(event)
        if len(self._events) == 1 and self._running:
            self._loop.call_soon(self._pump)

    def post_threadsafe(self, event: object) -> None:
        """Queue ``event`` from any thread."""
        self._loop.call_soon_threadsafe(self.post, event)

    def call_threadsafe(self, call: Callable[[], None]) -> None:
        """Call ``call`` on the loop's thread. From any thread."""
        self._loop.call_soon_threadsafe(call)

    def listen_for_stop(self) -> None:
        """Turn SIGTERM and SIGINT into StopRequested from now on. ``run`` calls this too."""
        if not self._listening:
            self._listening = True
            handle_stop_signals(self._loop, self._stop_requested)

    async def run(self, transport: Transport) -> str:
        """Run until the machine exits; return its reason. SIGTERM and SIGINT ask it to stop."""
        self._handlers |= {
            Send: lambda action: transport.send(action.peer, action.message),
            Connect: lambda action: transport.connect(action.peer, action.address),
            Disconnect: lambda action: transport.disconnect(action.peer),
        }
        self.listen_for_stop()
        self._events.appendleft(Started())
        self._running = True
        self._pauses = Pauses(self._clock.now())
        self._tick()
        self._loop.call_soon(self._pump)
        try:
            return await self._done
        finally:
            if self._ticking is not None:
                self._ticking.cancel()
            for timer in self._timers.values():
                timer.cancel()

    def _stop_requested(self) -> None:
        if self._stop_requests.is_new(self._clock.now()):
            self.post(StopRequested())

    def _pump(self) -> None:
        """Handle events, and perform the actions they lead to, for ``MAX_TIME_SLICE_S`` at most."""
        ends_s = time.monotonic() + MAX_TIME_SLICE_S
        # The event stays at the head until its last action is done, so that post() does not schedule a second pump.
        while self._events and not self._done.done():
            try:
                if self._go_on(ends_s):
                    self._actions = None
                    self._events.popleft()
            except Exception as error:
                logger.exception("error while handling %s", _name(self._events[0]))
                if self._dumps is not None:
                    self._dumps.write_crash(error)
                if not self._done.done():
                    self._done.set_exception(error)
                return
            if self._events and time.monotonic() >= ends_s:
                self._loop.call_soon(self._pump)
                return

    def _go_on(self, ends_s: float) -> bool:
        """Go on with the event at the head; return whether its last action is done, False if it is not by ``ends_s``.

        After ``Exit`` there is no other turn.
        """
        if self._actions is None:
            now = self._clock.now()
            paused_s = self._pauses.take(now)
            if paused_s > 0:
                log_event("warning", "this process did not run", {"paused_s": paused_s})
                self._events.appendleft(Resumed(paused_s))
            self._actions = iter(self._handle(self._events[0], now))
        for action in self._actions:
            self._handlers[type(action)](action)
            if time.monotonic() >= ends_s and not self._done.done():
                return False
        return True

    def _write_dump(self, dumps: Dumps, action: WriteDump) -> None:
        async def write() -> None:
            written = await dumps.write(prompts=action.with_prompts)
            self.post(DumpWritten(action.router, action.dump_id, *written))

        task = self._loop.create_task(write())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    def _set_timer(self, action: SetTimer) -> None:
        self._cancel_timer(action)
        delay_s = max(0.0, action.at_s - self._clock.now())
        self._timers[action.key] = self._loop.call_later(delay_s, self._fire, action.key)

    def _cancel_timer(self, action: SetTimer | CancelTimer) -> None:
        timer = self._timers.pop(action.key, None)
        if timer is not None:
            timer.cancel()

    def _tick(self) -> None:
        self._pauses.ran(self._clock.now())
        self._ticking = self._loop.call_later(TICK_S, self._tick)

    def _fire(self, key: Hashable) -> None:
        reading_s = self._pauses.reading_s(self._clock.now())
        if reading_s > 0:  # once: a loop that is slow again and again still has timers
            self._timers[key] = self._loop.call_later(reading_s, self._fired, key)
        else:
            self._fired(key)

    def _fired(self, key: Hashable) -> None:
        del self._timers[key]
        self.post(TimerFired(key))

    def _exit(self, action: Exit) -> None:
        if not self._done.done():
            self._done.set_result(action.reason)


def _name(event: object) -> str:
    """Return the type of ``event``, and of the message in it. Its contents may be a prompt, which no log may have."""
    name = type(event).__name__
    return f"{name}({type(event.message).__name__})" if isinstance(event, Received) else name
