"""What ``kvrelay up`` shows: lines of its processes, each with the name in its colour, progress bars, its own words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

from kvrelay.core.logging import parse_progress

_COLOURS = ("cyan", "green", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta", "bright_blue")
_LEVEL_STYLES = {"DEBUG": "dim", "INFO": "", "WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}
_OUR_LINE = re.compile(r"\d{4}-\d\d-\d\dT(?P<time>[\d:.]+)Z (?P<level>[A-Z]+) \S+ (?P<text>.*)")


class Display:
    """Writes to one console; on a terminal in colour and with bars, else in plain lines."""

    def __init__(self, console: Console, names: Iterable[str]) -> None:
        self._console = console
        self._styles = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
        self._width = max(map(len, self._styles), default=0)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._held: list[Text] | None = None

    def say(self, text: str) -> None:
        """Show words of the supervisor's own."""
        self._print("kvrelay", Text(text, "bold"))

    def warn(self, text: str) -> None:
        """Show that something went wrong."""
        self._print("kvrelay", Text(text, "bold yellow"))

    def show(self, renderable: RenderableType) -> None:
        """Show a table or the like."""
        self._console.print(renderable)

    def line(self, name: str, line: str) -> None:
        """Show a line that process ``name`` wrote; how far it is in loading moves its bar."""
        progress = parse_progress(line)
        if progress is not None and self._console.is_terminal:
            self._move_bar(name, *progress)
            return
        match = _OUR_LINE.fullmatch(line)
        if match is None:
            self._print(name, Text(line))
        else:
            text = f"{match['time']} {match['level'].lower():<7} {match['text']}"
            self._print(name, Text(text, _LEVEL_STYLES.get(match["level"], "")))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep lines back meanwhile, so that they do not come in between what somebody else prints."""
        self._held = []
        try:
            yield
        finally:
            lines, self._held = self._held, None
            for line in lines:
                self._console.print(line, soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Take bars away that are still there."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._bars.clear()

    def _print(self, name: str, text: Text) -> None:
        prefix = Text(f"{name:>{self._width}} | ", self._styles.get(name, "bold"))
        if self._held is not None:
            self._held.append(prefix + text)
        else:
            self._console.print(prefix + text, soft_wrap=True, highlight=False)

    def _move_bar(self, name: str, what: str, done: int, total: int) -> None:
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self._progress = Progress(*columns, console=self._console, auto_refresh=False, transient=True)
            self._progress.start()
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(f"{name:>{self._width}} | {what}", total=total)
        self._progress.update(self._bars[name], completed=done, total=total, refresh=True)
        if done >= total:
            self._progress.remove_task(self._bars.pop(name))
        if not self._bars:
            self.close()
