"""The thread that owns a library which makes progress only while it is polled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_LONGEST_STEP_S = 0.2


class RunningClock:
    """Seconds that this process has run. A pause of the process, for which no peer is to blame, counts as a moment."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._last_s = monotonic()
        self._now_s = 0.0

    def now(self) -> float:
        """Return the time, if it is read often."""
        read_s = self._monotonic()
        self._now_s += min(read_s - self._last_s, _LONGEST_STEP_S)
        self._last_s = read_s
        return self._now_s


class PollingThread:
    """Runs calls in order, and ``poll`` after each and whenever the seconds that ``poll`` returned have passed.

    None from ``poll``: not before the next call. The thread starts with the first call. If a call or ``poll`` raises,
    ``failed`` is called and the thread goes on with the next call, so that nobody waits for it in vain.
    """

    def __init__(self, name: str, poll: Callable[[], float | None], failed: Callable[[Exception], None]) -> None:
        self._name = name
        self._poll = poll
        self._failed = failed
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, call: Callable[[], None]) -> None:
        """Run ``call`` in the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put(call)

    def result_of(self, call: Callable[[], T]) -> T:
        """Run ``call`` in the thread and wait for it. Return its result or raise its exception."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

        self.do(run)
        return future.result()

    def _run(self) -> None:
        while True:
            try:
                self._serve()
                return
            except Exception as error:
                self._failed(error)

    def _serve(self) -> None:
        pause_s: float | None = None
        while True:
            with suppress(Empty):
                call = self._calls.get(timeout=pause_s)
                if call is None:
                    return
                call()
            pause_s = self._poll()

    def end(self) -> None:
        """End the thread after the calls so far."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None
