"""Scanners of text that comes in pieces: marks, blanks at the ends, and the end of a JSON value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Found(NamedTuple):
    """Text before a mark, the mark, and the text behind it. ``mark``: None if there is none yet."""

    before: str
    mark: str | None
    behind: str


class MarkScanner:
    """Finds the first of some ``marks``, and holds back text that may be the start of one."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, marks)))
        self._prefixes = sorted({mark[:end] for mark in marks for end in range(1, len(mark))}, key=len, reverse=True)
        self._held = ""

    def push(self, text: str) -> Found:
        """Return what ``text`` completes. Push ``behind`` again to find more."""
        text = self._held + text
        match = self._pattern.search(text)
        if match is not None:
            self._held = ""
            return Found(text[: match.start()], match[0], text[match.end() :])
        self._held = next((prefix for prefix in self._prefixes if text.endswith(prefix)), "")
        return Found(text[: len(text) - len(self._held)], None, "")

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


class Trimmer:
    """Passes text on without blanks at its end, which come with the text behind them, or never.

    Blanks at its beginning are dropped if ``trim_start``.
    """

    def __init__(self, *, trim_start: bool) -> None:
        self._drops = trim_start
        self._blanks: list[str] = []
        self._has_shown = False

    def push(self, text: str) -> str:
        """Return ``text``, after the blanks held back, without the blanks at its end."""
        if self._drops:
            text = text.lstrip()
        shown = text.rstrip()
        if not shown:
            if text:
                self._blanks.append(text)
            return ""
        blanks, self._blanks = "".join(self._blanks), [text[len(shown) :]]
        self._drops, self._has_shown = False, True
        return blanks + shown

    def interrupt(self) -> None:
        """Forget the blanks held back, because something other than text comes; blanks come first only behind text."""
        self._blanks.clear()
        self._drops = not self._has_shown

    def flush(self) -> str:
        """Return the blanks held back, at the end of the text."""
        blanks = "".join(self._blanks)
        self._blanks.clear()
        return blanks


_BEFORE_STRING = re.compile(r'["{}\[\]]|[^\w\s.,:+-]')
_IN_STRING = re.compile(r'["\\]')
_SCALAR = re.compile(r"[\w.+-]*")


class ValueScanner:
    """Finds the end of one JSON value. Brackets are counted, not matched; what cannot be JSON ends it too.

    ``broken``: it ended that way.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._kind = ""
        self.broken = False

    def push(self, text: str) -> int | None:
        """Return how much of ``text`` belongs to the value if it ends there, else None: all of it does."""
        place = 0
        if not self._kind and text:
            self._kind = text[0] if text[0] in '{["' else "scalar"
        if self._kind == "scalar":
            match = _SCALAR.match(text)
            assert match is not None
            return match.end() if match.end() < len(text) else None
        while place < len(text):
            if self._is_escaped:
                self._is_escaped = False
                place += 1
                continue
            match = (_IN_STRING if self._in_string else _BEFORE_STRING).search(text, place)
            if match is None:
                return None
            place = match.end()
            if self._ends(match[0]):
                return place - 1 if self.broken else place
        return None

    def _ends(self, char: str) -> bool:
        """Take in a character that matters; return whether the value ends with it."""
        if char == "\\" and self._in_string:
            self._is_escaped = True
        elif char == '"':
            self._in_string = not self._in_string
            return not self._in_string and self._depth == 0
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        else:
            self.broken = True
            return True
        return False
