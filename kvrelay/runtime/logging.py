"""Log lines, one per event: ``time LEVEL process event key=value ...``, or a JSON object.

Machines emit ``Log`` actions, and shells write them with ``log_event``. In text, tracebacks follow, indented; in
JSON they are a field.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal

from kvrelay.printable import printable

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

LogFormat = Literal["auto", "text", "json"]
"""auto: text on a terminal, else json."""

logger = logging.getLogger("kvrelay")


class Event:
    """What a record is about: the event and its fields. As text: ``event key=value ...``."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, fields: Mapping[str, object]) -> None:
        self.name = name
        self.fields = fields

    def __str__(self) -> str:
        return " ".join((self.name, *_pairs(self.fields)))


class LineFormatter(logging.Formatter):
    """Formats a record as one line without secrets or control characters."""

    converter = staticmethod(time.gmtime)

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03dZ %(levelname)s {process} %(message)s", "%Y-%m-%dT%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line of ``record``, without its traceback."""
        return printable(redacted(super().formatMessage(record)))

    def formatException(self, ei: _ExceptionInfo) -> str:  # noqa: N802
        """Return the traceback, indented so that its lines differ from events."""
        return printable(redacted("  " + super().formatException(ei).replace("\n", "\n  ")), keep="\n")


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object without secrets: ``time``, ``level``, ``process``, ``event`` and its fields.

    A field with one of these names is called ``field_NAME``. ``traceback`` is that of an error.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of ``record``."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event = record.msg if isinstance(record.msg, Event) else Event(record.getMessage(), {})
        line: dict[str, object] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "event": redacted(event.name),
        }
        own = frozenset({*line, "traceback"})
        for key, value in event.fields.items():
            name = f"field_{key}" if key in own else key
            line[name] = "***" if key in _SECRET_FIELDS else _json_value(value)
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = redacted(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def formatter(process: str, log_format: LogFormat, *, is_terminal: bool) -> logging.Formatter:
    """Return the formatter for ``log_format``."""
    if resolved_format(log_format, is_terminal=is_terminal) == "json":
        return JsonFormatter(process)
    return LineFormatter(process)


def resolved_format(log_format: LogFormat, *, is_terminal: bool) -> Literal["text", "json"]:
    """Return what ``log_format`` means for an output that is a terminal or not."""
    if log_format == "auto":
        return "text" if is_terminal else "json"
    return log_format


def set_up_logging(process: str, level: str = "info", log_format: LogFormat = "text") -> None:
    """Write all log records to standard error from now on, with ``process`` in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(process, log_format, is_terminal=sys.stderr.isatty()))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_event(level: str, event: str, fields: Mapping[str, object]) -> None:
    """Log ``event`` with ``fields``; ``level`` is debug, info, warning or error."""
    logger.log(logging.getLevelNamesMapping()[level.upper()], Event(event, fields))


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


def _json_value(value: object) -> object:
    """Return ``value`` if JSON has its type, else as text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return redacted(str(value))


def _pairs(fields: Mapping[str, object]) -> list[str]:
    return [f"{key}={'***' if key in _SECRET_FIELDS else _value(value)}" for key, value in fields.items()]


def _value(value: object) -> str:
    """Return ``value`` quoted, unless it is unambiguous without quotes."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
