"""Decides whether and when a process that ended is restarted."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from kvrelay.config.cluster_config import ClusterSettings

_CAUSES = {
    signal.SIGILL: "this CPU lacks an instruction that kernels or a library use; another engine.kernels may do without",
    signal.SIGSEGV: "a fault in native code: kernels, Paddle or another library",
    signal.SIGBUS: "memory it had mapped could not be provided: too little memory, or a file became shorter",
    signal.SIGFPE: "an arithmetic fault in native code",
    signal.SIGABRT: "native code gave up; what it said is above",
    signal.SIGKILL: "by the kernel if memory ran out, or by a user",
}
FAULTS = frozenset({signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT})
"""Signals that are caused by a process's own code."""

_LONG_LIFE_S = 3600.0
"""A process that ran longer than this ends a series of crashes."""


@dataclass(frozen=True, slots=True)
class Life:
    """One run of a process. ``code``: its exit status, or the negative number of the signal that killed it."""

    code: int
    lived_s: float
    was_ready: bool

    @property
    def ending(self) -> str:
        """How it ended, with the likely cause of a signal."""
        if self.code >= 0:
            return f"exited with {self.code}"
        try:
            number = signal.Signals(-self.code)
        except ValueError:  # a real-time signal
            return f"was killed by signal {-self.code}"
        cause = _CAUSES.get(number)
        return f"was killed by {number.name}" + (f" ({cause})" if cause else "")

    @property
    def will_recur(self) -> bool:
        """Whether the next run is likely to end the same way: it was never ready, or its own code is at fault.

        A process that ends with 0 was told to, by a signal or by an operator.
        """
        return self.code != 0 and (not self.was_ready or -self.code in FAULTS)


class RestartPolicy:
    """Restart policy of one process: growing delays, and no restart after too many consecutive crashes."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self._next_s = settings.restart_backoff_s
        self.num_crashes = 0
        """Consecutive runs that are likely to recur."""

    def delay_after(self, life: Life) -> float | None:
        """Return the delay before the next start in seconds, or None if the process is not restarted."""
        if not life.will_recur or life.lived_s > _LONG_LIFE_S:
            self.num_crashes = 0
        self.num_crashes += life.will_recur
        return None if self.num_crashes >= self._settings.max_crashes else self._backoff_s(life.lived_s)

    def _backoff_s(self, lived_s: float) -> float:
        longest_s = self._settings.restart_backoff_max_s
        if lived_s > longest_s:
            self._next_s = self._settings.restart_backoff_s
        delay_s = min(self._next_s, longest_s)
        self._next_s = 2 * delay_s
        return delay_s
