"""What ``kvrelay up`` shows of its processes' lines, and the lines themselves."""

from __future__ import annotations

import io
import logging
import sys
from contextlib import closing
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from kvrelay.cluster.display import Display
from kvrelay.cluster.tables import nodes_table, status_tables, timeline_table
from kvrelay.cluster.terminal import PlainConsole
from kvrelay.runtime.logging import LineFormatter, log_event, parse_progress, progress_log


def line_of(message: str, *args: object, error: BaseException | None = None) -> str:
    record = logging.LogRecord("kvrelay", logging.WARNING, __file__, 1, message, args, None)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
    return LineFormatter("p0").format(record)


def shown(*lines: str, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    display = Display(console, ["router", "p0"])
    for line in lines:
        display.line("p0", line)
    display.close()
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_log_line_is_one_line_with_time_level_and_process() -> None:
    line = line_of("registered router=r1")

    assert line.endswith("Z WARNING p0 registered router=r1")
    assert line_of("two\nlines").endswith("two\\nlines")
    assert line_of("red \x1b[31m \x7f \u202e é").endswith(r"red \x1b[31m \x7f \u202e é")


def test_fields_are_quoted_when_they_would_not_read_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "kvrelay"):
        log_event("info", "ended", {"reason": 'peer "d0" lost', "tokens": 3, "seconds": 0.1234567, "note": ""})

    assert caplog.messages == ['ended reason="peer \\"d0\\" lost" tokens=3 seconds=0.123457 note=""']


def test_secrets_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "kvrelay"):
        log_event("info", "connected", {"password": "hunter2", "num_tokens": 5})

    assert caplog.messages == ["connected password=*** num_tokens=5"]
    assert line_of("to redis://me:hunter2@host:1").endswith("to redis://***@host:1")
    assert line_of("header Bearer sk-123").endswith("header Bearer ***")


def test_a_traceback_follows_its_line_indented() -> None:
    try:
        raise ValueError("redis://me:hunter2@host")
    except ValueError as error:
        first, *rest = line_of("broken", error=error).split("\n")

    assert first.endswith("broken")
    assert rest
    assert all(line.startswith("  ") for line in rest)
    assert "hunter2" not in "".join(rest)


def test_progress_is_told_twice_a_second_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    on_progress = progress_log("d0 checkpoint", lambda: now_s)
    with caplog.at_level("INFO", "kvrelay"):
        for done in range(1001):
            on_progress(done, 1000)
            now_s += 1 / 512

    told = [parse_progress(" " + message) for message in caplog.messages]
    assert told == [("d0 checkpoint", done, 1000) for done in (256, 512, 768, 1000)]
    assert parse_progress(" registered") is None


def test_lines_carry_the_process_s_name_once() -> None:
    assert shown(line_of("registered")).split(" | ")[0] == "    p0"
    assert shown(line_of("registered")).endswith("warning registered\n")
    of_another = line_of("registered").replace(" p0 ", " p0.messager ")
    assert shown(of_another).endswith("warning p0.messager: registered\n")
    assert shown("Segmentation fault") == "    p0 | Segmentation fault\n"
    assert shown("[bold]no markup[/bold]") == "    p0 | [bold]no markup[/bold]\n"


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere() -> None:
    lines = [line_of(f"progress what=checkpoint done={done} total=2") for done in (1, 2)]

    assert "progress what=checkpoint done=1 total=2\n" in shown(*lines)
    on_terminal = shown(*lines, terminal=True)
    assert "progress what" not in on_terminal
    assert "50%" in on_terminal


def test_a_start_is_a_bar_on_a_terminal_and_a_line_for_each_stage_elsewhere() -> None:
    def console_after(*stages: str, terminal: bool) -> str:
        console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
        with closing(Display(console, ["router", "p0"])) as display:
            for stage in stages:
                display.stage("p0", stage)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    assert console_after("importing Paddle", "ready", terminal=False) == "    p0 | importing Paddle\n    p0 | ready\n"
    assert "p0 | importing Paddle" in console_after("importing Paddle", "ready", terminal=True)
    assert console_after("ready", terminal=True) == ""


def test_checkpoint_progress_moves_the_bar_of_its_process() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with closing(Display(console, ["p0"])) as display:
        display.stage("p0", "loading weights")
        display.line("p0", line_of("progress what=checkpoint done=1 total=4"))
        display.stage("p0", "connecting")

    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "p0 | loading weights" in text
    assert "25%" in text
    assert "p0 | checkpoint" not in text


def test_silence_is_broken_by_who_is_awaited_and_how_far_they_are() -> None:
    console = Console(file=io.StringIO(), width=100)
    display = Display(console, ["p0", "d0"])
    stages = {"p0": "importing Paddle", "d0": "starting"}

    for tenths in range(41):
        if tenths == 30:
            display.line("p0", "a word")
        display.waiting_for(stages, "no decode node", tenths / 10)
    display.waiting_for({}, "no decode node", 10.0)

    waiting = "kvrelay | waiting for p0 (importing Paddle), d0 (starting)\n"
    assert console.file.getvalue() == (  # type: ignore[attr-defined]
        waiting + "p0 | a word\n".rjust(12) + "kvrelay | waiting: no decode node\n"
    )


def test_who_is_awaited_is_said_again_after_twice_as_long_each_time_until_it_changes() -> None:
    console = Console(file=io.StringIO(), width=100)
    display = Display(console, ["p0"])
    said: list[float] = []

    def wait_until(until_s: float, stage: str, begin_s: float = 0.0) -> None:
        for tenths in range(round(10 * begin_s), round(10 * until_s)):
            size = console.file.tell()
            display.waiting_for({"p0": stage}, "", tenths / 10)
            if console.file.tell() > size:
                said.append(tenths / 10)

    wait_until(100.0, "importing Paddle")
    assert said == [1.5, 4.5, 10.5, 22.5, 46.5, 76.5]
    said.clear()
    wait_until(105.0, "loading weights", begin_s=100.0)
    assert said == [100.0, 103.0]


LOAD = {
    "num_running": 41,
    "num_waiting": 0,
    "num_receiving": 0,
    "num_sending": 0,
    "used_blocks": 7,
    "evictable_blocks": 0,
    "free_blocks": 57,
}


def test_status_shows_every_node_with_its_load() -> None:
    status: dict[str, Any] = {
        "nodes": [
            {"name": "p0", "role": "prefill", "state": "ready", "address": "tcp://h:1", "load": LOAD},
            {"name": "d0", "role": "decode", "state": "lost", "address": "tcp://h:2", "load": None},
        ],
        "requests": {"running": 17, "kv_bytes_moved": 3, "failed": 0},
    }
    console = Console(file=io.StringIO(), width=120)
    console.print(status_tables(status))
    text = console.file.getvalue()  # type: ignore[attr-defined]

    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["d0", "decode", "lost", "h:2", "-", "-", "-", "-", "-", "-", "-"],
        ["p0", "prefill", "ready", "h:1", "41", "0", "0", "0", "7", "0", "57"],
    ]
    assert text.endswith("requests: running 17, kv bytes moved 3\n")
    assert nodes_table({}).row_count == 0


def test_status_shows_missing_nodes_and_the_workers_of_the_router() -> None:
    status = {
        "nodes": [],
        "missing_nodes": [{"name": "d0", "role": "decode"}],
        "http_workers": [{"name": "router-0", "pid": 4711, "num_requests": 3}],
        "requests": {"submitted": 7, "self_checks": 2, "kv_bytes_moved": 22_183_936},
    }
    console = Console(file=io.StringIO(), width=100)
    console.print(status_tables(status))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]

    assert lines[1] == ["d0", "decode", "missing", *"--------"]
    assert lines[3:5] == [["worker", "pid", "requests"], ["router-0", "4711", "3"]]
    assert " ".join(lines[6]) == "requests: submitted 7, kv bytes moved 22,183,936"


def test_texts_of_others_are_no_markup_and_no_commands_for_the_terminal() -> None:
    console = PlainConsole(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor")
    console.print("[/red] :smile: \x1b[31m\x9b31m\ttab\nline", soft_wrap=True)
    table = Table("a")
    table.add_row("[bold]x[/bold]\x1b[2J")
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]

    assert r"[/red] :smile: \x1b[31m\x9b31m" in text
    assert r"[bold]x[/bold]\x1b[2J" in text
    assert "\x1b[31m" not in text
    assert "\x1b[2J" not in text


def test_lines_of_processes_and_texts_of_a_server_are_no_commands_for_the_terminal() -> None:
    """Those of libraries, and tracebacks, come as they are."""
    command = "\x1b[2J\u202e"
    assert shown(f"a {command}").endswith("| a \\x1b[2J\\u202e\n")
    console = PlainConsole(file=io.StringIO(), width=200)
    display = Display(console, ["p0"])
    display.warn(command)
    display.stage("p0", command)
    node = {"name": command, "role": command, "state": command, "address": command}
    console.print(status_tables({"nodes": [node], "missing_nodes": [node], "requests": {command: 3}}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count(r"\x1b[2J\u202e") == 9
    assert not set(command[:1] + command[-1:]) & set(text)


def test_the_log_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("kvrelay")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("d0"))
    logger.addHandler(handler)
    try:
        log_event("error", "gone", {"peer": "p0#1"})
    finally:
        logger.removeHandler(handler)

    assert capsys.readouterr().err.endswith("Z ERROR d0 gone peer=p0#1\n")


def test_a_timeline_puts_layers_between_the_marks() -> None:
    timeline = {
        "marks": [
            {"name": "received", "at_s": 100.0, "node": "router"},
            {"name": "first_token", "at_s": 100.02, "node": "p0"},
        ],
        "layers": [{"layer": 0, "first_sent_s": 100.01, "last_written_s": 100.0125, "num_bytes": 16384}],
    }
    console = Console(file=io.StringIO(), width=120)
    console.print(timeline_table(timeline))

    lines = [line.split(maxsplit=2) for line in console.file.getvalue().splitlines()[1:]]  # type: ignore[attr-defined]
    assert [(at_ms, where, what.rstrip()) for at_ms, where, what in lines] == [
        ("0.0", "router", "received"),
        ("10.0", "transfer", "layer 0: 16,384 bytes of KV sent, written 2.5 ms later"),
        ("20.0", "p0", "first token"),
    ]


def test_lines_held_back_come_afterwards() -> None:
    console = Console(file=io.StringIO(), width=100)
    display = Display(console, ["p0"])
    with display.held():
        display.line("p0", "meanwhile")
        console.print("an answer")

    assert console.file.getvalue() == "an answer\np0 | meanwhile\n"  # type: ignore[attr-defined]
