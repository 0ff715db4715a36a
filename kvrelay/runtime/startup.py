"""What a process tells of its start: to its supervisor if it has one, else to its log."""

from __future__ import annotations

import os

from kvrelay.runtime.logging import log_event

STAGES_FD = "KVRELAY_STAGES_FD"
"""Names the descriptor a supervisor reads stages from, a line each."""

READY = "ready"
"""The last stage: the process does what it is there for, or would if the others were there."""


class Startup:
    """The stages of this process's start. Says each once, however often it is told."""

    def __init__(self) -> None:
        self._stage = ""
        self._fd: int | None = None

    def report(self, stage: str) -> None:
        """Tell that ``stage`` has begun."""
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
"""This process's start."""
