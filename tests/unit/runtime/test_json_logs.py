"""Log records as JSON objects."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from kvrelay.runtime.logging import Event, JsonFormatter, LineFormatter, formatter


def parsed(message: object, *args: object, error: BaseException | None = None) -> dict[str, Any]:
    info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord("kvrelay", logging.WARNING, __file__, 1, message, args, info)
    line = JsonFormatter("d0").format(record)
    assert "\n" not in line
    result: dict[str, Any] = json.loads(line)
    del result["time"]
    return result


def test_fields_keep_their_types() -> None:
    fields = {"node": "p0", "tokens": 3, "share": 0.5, "is_last": True, "nothing": None, "path": object}
    assert parsed(Event("ended", fields)) == {
        "level": "warning",
        "process": "d0",
        "event": "ended",
        **fields,
        "path": "<class 'object'>",
    }


def test_a_record_without_fields_is_an_event() -> None:
    assert parsed("%d blocks,\n%s", 3, "\x1b[2J")["event"] == "3 blocks,\n\x1b[2J"


def test_fields_cannot_replace_those_of_every_line() -> None:
    line = parsed(Event("lost", {"process": "p1", "event": "x", "time": 1, "traceback": "y"}))

    assert (line["process"], line["event"]) == ("d0", "lost")
    assert {name: value for name, value in line.items() if name.startswith("field_")} == {
        "field_process": "p1",
        "field_event": "x",
        "field_time": 1,
        "field_traceback": "y",
    }


def test_numbers_that_json_has_not_are_texts() -> None:
    assert parsed(Event("x", {"a": float("nan"), "b": float("inf")})) | {"event": "x"} == {
        "level": "warning",
        "process": "d0",
        "event": "x",
        "a": "nan",
        "b": "inf",
    }


def test_secrets_are_not_logged() -> None:
    line = parsed(Event("connected", {"password": "hunter2", "url": "redis://me:hunter2@host", "note": "Bearer sk-1"}))
    try:
        raise ValueError("redis://me:hunter2@host")
    except ValueError as error:
        failed = parsed("to %s", "redis://me:hunter2@host", error=error)

    assert line == {
        "level": "warning",
        "process": "d0",
        "event": "connected",
        "password": "***",
        "url": "redis://***@host",
        "note": "Bearer ***",
    }
    assert "hunter2" not in json.dumps(failed)
    assert failed["traceback"].startswith("Traceback")


def test_auto_is_text_on_a_terminal_only() -> None:
    assert isinstance(formatter("d0", "auto", is_terminal=True), LineFormatter)
    assert isinstance(formatter("d0", "auto", is_terminal=False), JsonFormatter)
    assert isinstance(formatter("d0", "text", is_terminal=False), LineFormatter)
    assert isinstance(formatter("d0", "json", is_terminal=True), JsonFormatter)


def test_an_event_is_text_in_other_formatters(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "kvrelay"):
        logging.getLogger("kvrelay").info(Event("ended", {"reason": "a b"}))

    assert caplog.messages == ['ended reason="a b"']
