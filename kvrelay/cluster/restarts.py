"""Whether a process that ended is started again, and when."""

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
    signal.SIGKILL: "by the kernel if memory ran out, else by somebody",
}
FAULTS = frozenset({signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT})
"""Signals by which a process is killed for what its own code does."""

_LONG_LIFE_S = 3600.0
"""A process that lived as long as this is not in a series of crashes."""


@dataclass(frozen=True, slots=True)
class Life:
    """One run of a process. ``code``: its exit status, or the negative number of the signal that killed it."""

    code: int
    lived_s: float
    was_ready: bool

    @property
    def ending(self) -> str:
        """How it ended, and the likely cause if a signal killed it."""
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
        """Whether the next life is likely to end the same way: it never began to serve, or its code is at fault."""
        return not self.was_ready or -self.code in FAULTS


class RestartPolicy:
    """The restarts of one process: each later than the one before, and none after too many crashes in a row."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self._next_s = settings.restart_backoff_s
        self.num_crashes = 0
        """Lives in a row that will recur."""

    def delay_after(self, life: Life) -> float | None:
        """Return the seconds to wait before the next start, or None if there should be none."""
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
