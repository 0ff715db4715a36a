"""The check that a running process makes of itself: its machine's conservation laws, while the machine is idle."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from kvrelay.config.self_check_mode import SelfCheckMode
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import Log
from kvrelay.machine.laws import Laws, Violation
from kvrelay.machine.log_limit import LogLimit
from kvrelay.machine.outbox import RoleOutbox

CHECKS, VIOLATIONS = "self_checks", "self_check_violations"
"""Names of the counters in a role's metrics."""

LOG_EVENT = "self-check failed"

_MAX_SHOWN = 8
"""Violations in a log line."""

_MAX_HISTORY = 32
"""Operations on a block in a log line."""


class SelfCheck:
    """Makes one part of a check at each heartbeat at which the machine is idle, and rests when nothing has changed.

    ``laws`` begins a check. ``history`` returns what was last done with a KV block. Violations are counted and,
    when the check ends, logged in one line, at most one a minute; in mode ``fatal`` they are raised.
    """

    def __init__(
        self,
        mode: SelfCheckMode,
        laws: Callable[[], Laws],
        outbox: RoleOutbox[Any],
        history: Callable[[int], list[str]] | None = None,
    ) -> None:
        self._mode = mode
        self._laws = laws
        self._outbox = outbox
        self._history = history
        self._activity: Hashable = None
        self._parts: Laws | None = None
        self._found: list[Violation] = []
        self._is_complete = False
        self._log_limit = LogLimit()
        self.num_checks = 0
        self.num_violations = 0

    @property
    def counters(self) -> dict[str, int]:
        """Complete checks, and violations found in all checks. They only grow."""
        return {CHECKS: self.num_checks, VIOLATIONS: self.num_violations}

    def beat(self, activity: Hashable) -> None:
        """Take a heartbeat. ``activity``: None if the machine is not idle, else what each of its changes changes.

        A check begins at the second heartbeat with the same value: what is still on its way has arrived then. Raises
        LocalProtocolError if a law does not hold and the mode is ``fatal``.
        """
        if self._mode == "off":
            return
        if activity is None or activity != self._activity:
            self._end()
            self._activity, self._is_complete = activity, False
        elif not self._is_complete:
            self._next_part()

    def _next_part(self) -> None:
        if self._parts is None:
            self._parts = self._laws()
        part = next(self._parts, None)
        if part is None:
            self._end()
            self._is_complete = True
            self.num_checks += 1
        elif part:
            self.num_violations += len(part)
            self._found += part[: _MAX_SHOWN - len(self._found)]
            if self._mode == "fatal":
                self._end()

    def _end(self) -> None:
        """End the check, if one is under way, and report what it has found."""
        found, self._found, self._parts = self._found, [], None
        if not found:
            return
        texts = [violation.text for violation in found]
        if self._mode == "fatal":
            raise LocalProtocolError(f"{LOG_EVENT}: " + "; ".join(texts))
        if self._log_limit.permits(LOG_EVENT, self._outbox.now):
            fields: dict[str, object] = {"violations": texts, VIOLATIONS: self.num_violations}
            block = next((violation.block for violation in found if violation.block is not None), None)
            if block is not None and self._history is not None:
                fields |= {"block": block, "history": self._history(block)[-_MAX_HISTORY:]}
            self._outbox.do(Log("error", LOG_EVENT, fields))
