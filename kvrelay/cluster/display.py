"""The output of ``kvrelay up``: prefixed lines of its processes, progress bars, and messages of the supervisor."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from kvrelay.printable import printable
from kvrelay.runtime.logging import Event, JsonFormatter, parse_progress
from kvrelay.runtime.startup import READY

_COLOURS = ("cyan", "green", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta", "bright_blue")
_LEVEL_STYLES = {"DEBUG": "dim", "INFO": "", "WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}
_OUR_LINE = re.compile(r"\d{4}-\d\d-\d\dT(?P<time>[\d:.]+)Z (?P<level>[A-Z]+) (?P<process>\S+) (?P<text>.*)")

_SILENCE_S = 1.5
"""Seconds without output after which a line says which processes are awaited, if there are no bars."""

_MAX_SILENCE_S = 30.0
"""The same line comes again after twice as long each time, up to this."""


class _Bar(NamedTuple):
    """A starting process: its stage and the progress bar of the stage."""

    what: str
    task: TaskID


def is_log_line(line: str) -> bool:
    """Return whether a process of the cluster has logged ``line``, as text or as JSON; others write lines too."""
    return _is_object(line) or _OUR_LINE.fullmatch(line) is not None


def _is_object(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


class Display:
    """Writes to one console: with colours and bars on a terminal, else in plain lines.

    ``as_json``: every line is a JSON object, and nothing else is written. Lines of processes are passed on unchanged if
    they are objects, else as the field ``text`` of one.
    """

    def __init__(self, console: Console, names: Iterable[str], *, as_json: bool = False) -> None:
        self._console = console
        self._as_json = as_json
        self._styles = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
        self._width = max(map(len, self._styles), default=0)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._bars: dict[str, _Bar] = {}
        self._held: list[Text] | None = None
        self._num_shown = 0
        self._silence: tuple[int, float] | None = None
        """Number of lines shown, and the time, when silence began."""
        self._awaited = ""
        self._wait_s = _SILENCE_S

    def say(self, text: str) -> None:
        """Show a message of the supervisor."""
        if self._as_json:
            self._write_json("info", "kvrelay", text, {})
        else:
            self._print("kvrelay", text, "bold")

    def warn(self, text: str) -> None:
        """Show a warning of the supervisor."""
        if self._as_json:
            self._write_json("warning", "kvrelay", text, {})
        else:
            self._print("kvrelay", text, "bold yellow")

    def show(self, renderable: RenderableType) -> None:
        """Show a renderable, such as a table, but not as JSON."""
        if not self._as_json:
            self._console.print(renderable)

    def line(self, name: str, line: str) -> None:
        """Show a line of process ``name``. A progress line moves its bar instead."""
        if self._as_json:
            if _is_object(line):
                self._write(line)
            else:
                self._write_json("info", name, "output", {"text": line})
            return
        progress = parse_progress(line)
        if progress is not None and self._console.is_terminal:
            self._move_bar(name, *progress)
            return
        match = _OUR_LINE.fullmatch(line)
        if match is None:
            self._print(name, line)
        else:
            whose = "" if match["process"] == name else f"{match['process']}: "  # a messager's, or a worker's
            text = f"{match['time']} {match['level'].lower():<7} {whose}{match['text']}"
            self._print(name, text, _LEVEL_STYLES.get(match["level"], ""))

    def stage(self, name: str, stage: str) -> None:
        """Show the start-up stage of process ``name``: as a bar until it is ready, or as one line per stage."""
        if self._as_json:
            self._write_json("info", name, "stage", {"stage": stage})
        elif not self._console.is_terminal:
            self._print(name, stage)
        elif stage == READY:
            self._remove_bar(name)
        elif self._held is None:
            self._bar(name, stage)

    def ended(self, name: str) -> None:
        """Remove the bar of process ``name``, which is not starting any more."""
        self._remove_bar(name)

    def waiting_for(self, stages: Mapping[str, str], reason: str, now: float) -> None:
        """Show which processes are not ready, or else ``reason``, if nothing has been shown for some time."""
        if self._console.is_terminal and self._bars:
            return
        who = ", ".join(f"{name} ({stage})" for name, stage in stages.items())
        text = f"waiting for {who}" if who else f"waiting: {reason}"
        if text != self._awaited:
            self._awaited, self._wait_s = text, _SILENCE_S
        if self._silence is None or self._silence[0] != self._num_shown:
            self._silence = (self._num_shown, now)
        elif now - self._silence[1] >= self._wait_s:
            self._wait_s = min(2 * self._wait_s, _MAX_SILENCE_S)
            self.say(text)
            self._silence = (self._num_shown, now)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold lines back inside the context, so that they do not mix with other output."""
        self._held = []
        try:
            yield
        finally:
            lines, self._held = self._held, None
            for line in lines:
                self._console.print(line, soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Remove all bars."""
        for name in list(self._bars):
            self._remove_bar(name)

    def _write_json(self, level: str, name: str, event: str, fields: Mapping[str, object]) -> None:
        record = logging.LogRecord("kvrelay", getattr(logging, level.upper()), "", 0, Event(event, fields), None, None)
        self._write(JsonFormatter(name).format(record))

    def _write(self, line: str) -> None:
        self._num_shown += 1
        self._console.file.write(line + "\n")
        self._console.file.flush()

    def _print(self, name: str, text: str, style: str = "") -> None:
        self._num_shown += 1
        prefix = Text(f"{name:>{self._width}} | ", self._styles.get(name, "bold"))
        line = prefix + Text(printable(text, keep="\t"), style)
        if self._held is not None:
            self._held.append(line)
        else:
            self._console.print(line, soft_wrap=True, highlight=False)

    def _move_bar(self, name: str, what: str, done: int, total: int) -> None:
        if self._held is None:
            task = self._bar(name, self._bars[name].what if name in self._bars else what)
            self._progress.update(task, completed=done, total=total, refresh=True)

    def _bar(self, name: str, what: str) -> TaskID:
        """Return the bar of ``name``, a new one if ``what`` has changed."""
        bar = self._bars.get(name)
        if bar is None or bar.what != what:
            self._remove_bar(name)
            bar = _Bar(what, self._progress.add_task(f"{name:>{self._width}} | {what}", total=None))
            self._bars[name] = bar
            self._progress.start()
        return bar.task

    def _remove_bar(self, name: str) -> None:
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name).task)
            if not self._bars:
                self._progress.stop()
