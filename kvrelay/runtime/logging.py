"""Log lines, one per event: ``time LEVEL process event key=value ...``.

Machines emit ``Log`` actions, and shells write them with ``log_event``. Tracebacks follow, indented.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType

_ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

PROGRESS_EVENT = "progress"
"""Lines of this event carry ``what=... done=n total=n``; the supervisor draws them as a bar."""

_PROGRESS_INTERVAL_S = 0.5
_PLAIN = re.compile(r"[^\s\"'=]+")
_SECRET_FIELDS = frozenset({"authorization", "password", "secret", "api_key"})
_SECRETS = (
    (re.compile(r"(?i)\bbearer\s+\S+"), "Bearer ***"),
    (re.compile(r"://[^/\s@]+@"), "://***@"),
)

logger = logging.getLogger("kvrelay")


class LineFormatter(logging.Formatter):
    """Formats a record as one line without secrets or control characters."""

    converter = staticmethod(time.gmtime)

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03dZ %(levelname)s {process} %(message)s", "%Y-%m-%dT%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line of ``record``, without its traceback."""
        return redacted(super().formatMessage(record)).replace("\r", "\\r").replace("\n", "\\n")

    def formatException(self, ei: _ExceptionInfo) -> str:  # noqa: N802
        """Return the traceback, indented so that its lines differ from events."""
        return redacted("  " + super().formatException(ei).replace("\n", "\n  "))


def set_up_logging(process: str, level: str = "info") -> None:
    """Write all log records to standard error from now on, with ``process`` in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_event(level: str, event: str, fields: Mapping[str, object]) -> None:
    """Log ``event`` with ``fields``; ``level`` is debug, info, warning or error."""
    logger.log(logging.getLevelNamesMapping()[level.upper()], "%s", " ".join((event, *_pairs(fields))))


def progress_log(what: str, now: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """Return ``on_progress(done, total)``, which logs the progress of ``what`` twice a second and when done."""
    next_s = now() + _PROGRESS_INTERVAL_S

    def on_progress(done: int, total: int) -> None:
        nonlocal next_s
        if done >= total or now() >= next_s:
            next_s = now() + _PROGRESS_INTERVAL_S
            log_event("info", PROGRESS_EVENT, {"what": what, "done": done, "total": total})

    return on_progress


def parse_progress(line: str) -> tuple[str, int, int] | None:
    """Return (what, done, total) of a ``line`` of ``progress_log``, or None."""
    match = re.search(rf" {PROGRESS_EVENT} what=(\"[^\"]*\"|\S+) done=(\d+) total=(\d+)$", line)
    return (match[1].strip('"'), int(match[2]), int(match[3])) if match else None


def redacted(text: str) -> str:
    """Return ``text`` without passwords, keys and credentials in URLs."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _pairs(fields: Mapping[str, object]) -> list[str]:
    return [f"{key}={'***' if key in _SECRET_FIELDS else _value(value)}" for key, value in fields.items()]


def _value(value: object) -> str:
    """Return ``value`` quoted, unless it is unambiguous without quotes."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
