"""SIGTERM and SIGINT: handling during start-up, and detection of a second stop request.

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
"""``timeout`` and some supervisors signal a process and then its group. Signals closer than this are one request."""

_HAND_OVER = signal.SIGRTMIN
_waiting: list[Thread] = []


class SignalLoop(Protocol):
    """The method of an event loop that is used here."""

    def add_signal_handler(self, sig: int, callback: Callable[[], object]) -> None:
        """Call ``callback`` on the loop for each ``sig``."""


def exit_on_stop_signals() -> None:
    """From now until ``handle_stop_signals``: exit with status 0 on a stop signal.

    Call from the main thread, before others are started: they inherit that the signals are blocked. Nothing is cleaned
    up, so whatever outlives the process (files, children) is made after ``handle_stop_signals``.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, _HAND_OVER))
    thread = Thread(target=_exit_on_stop_signal, name="stop signals", daemon=True)
    thread.start()
    _waiting.append(thread)


def handle_stop_signals(
    loop: SignalLoop, on_stop: Callable[[], object], numbers: Iterable[signal.Signals] = STOP_SIGNALS
) -> None:
    """From now on: call ``on_stop`` on ``loop`` for each of ``numbers``. Ends ``exit_on_stop_signals``.

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
    """Ignore stop signals for the rest of this process, which is exiting.

    A loop that is closed gives the signals back to Python, whose handler would print a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _exit_on_stop_signal() -> None:
    if signal.sigwait((*STOP_SIGNALS, _HAND_OVER)) != _HAND_OVER:
        os._exit(0)


class StopRequests:
    """Distinguishes stop requests from repetitions of the previous one."""

    def __init__(self) -> None:
        self._last_s: float | None = None

    def is_new(self, now: float) -> bool:
        """Return whether a signal at ``now`` (seconds) is a new request."""
        if self._last_s is not None and now - self._last_s < REPEAT_AFTER_S:
            return False
        self._last_s = now
        return True
