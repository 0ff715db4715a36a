"""SIGTERM and SIGINT: while a process starts, and what counts as a second request to stop.

A process that starts has nothing to clean up, so it ends at once. Python's own handlers would run only when the
current call into C returns, and Paddle, while it is imported, installs handlers that print a crash report. So the
signals are blocked in every thread, and one thread waits for them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Protocol

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

REPEAT_AFTER_S = 1.0
"""``timeout`` and some supervisors signal a process and then its group: what comes sooner is the same request."""

_HAND_OVER = signal.SIGRTMIN
_waiting: list[Thread] = []


class SignalLoop(Protocol):
    """The part of an event loop that is used here."""

    def add_signal_handler(self, sig: int, callback: Callable[[], object]) -> None:
        """Call ``callback`` on the loop when ``sig`` comes."""


def exit_on_stop_signals() -> None:
    """End this process with status 0 when it is told to stop, from here until ``handle_stop_signals``.

    Call from the main thread, before others are started: they inherit that the signals are blocked. Nothing is cleaned
    up, so whatever outlives the process (files, children) is made after ``handle_stop_signals``.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, _HAND_OVER))
    thread = Thread(target=_exit_when_told, name="stop signals", daemon=True)
    thread.start()
    _waiting.append(thread)


def handle_stop_signals(
    loop: SignalLoop, on_stop: Callable[[], object], numbers: Iterable[signal.Signals] = STOP_SIGNALS
) -> None:
    """Call ``on_stop`` on ``loop`` for each of ``numbers`` from here on; ``exit_on_stop_signals`` is over.

    A signal that comes in between is not lost: it stays pending until the loop has its handlers.
    """
    while _waiting:
        thread = _waiting.pop()
        if thread.ident is not None:
            signal.pthread_kill(thread.ident, _HAND_OVER)
        thread.join()
    for number in numbers:
        loop.add_signal_handler(number, on_stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, _HAND_OVER))


def ignore_stop_signals() -> None:
    """Let nothing interrupt the rest of this process's life: all that could be stopped has ended.

    A loop that is closed gives the signals back to Python, whose handler would print a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _exit_when_told() -> None:
    if signal.sigwait((*STOP_SIGNALS, _HAND_OVER)) != _HAND_OVER:
        os._exit(0)


class StopRequests:
    """Tells requests to stop apart from echoes of the one before."""

    def __init__(self) -> None:
        self._last_s: float | None = None

    def is_new(self, now: float) -> bool:
        """Return whether a signal at ``now`` (seconds) is a request of its own."""
        if self._last_s is not None and now - self._last_s < REPEAT_AFTER_S:
            return False
        self._last_s = now
        return True
