"""Reports the start-up stages of a process to its supervisor, or to its log without one."""

from __future__ import annotations

import os

from kvrelay.runtime.logging import log_event

STAGES_FD = "KVRELAY_STAGES_FD"
"""Environment variable with the file descriptor for stages, one per line."""

READY = "ready"
"""The last stage: the process serves, or waits only for other processes."""


class Startup:
    """The start-up stages of this process. Each stage is reported once."""

    def __init__(self) -> None:
        self._stage = ""
        self._fd: int | None = None

    def report(self, stage: str) -> None:
        """Report that ``stage`` has begun."""
        if stage == self._stage:
            return
        self._stage = stage
        if self._fd is None and STAGES_FD in os.environ:
            self._fd = int(os.environ.pop(STAGES_FD))  # it is no business of this process's children
        if self._fd is None:
            log_event("info", "starting", {"stage": stage})
        else:
            os.write(self._fd, f"{stage}\n".encode())


startup = Startup()
"""The start-up of this process."""
