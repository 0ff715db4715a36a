"""A call as a JSON object: ``{"name": ..., "arguments": {...}}``."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Literal, NamedTuple, TypeAlias

from router.tools.text_scan import ValueScanner

ARGUMENTS = ("arguments", "parameters")
"""Both names are in use for the same."""

_KEYS = frozenset({"name", *ARGUMENTS, "type", "id", "index"})
"""Keys of calls. An object with another key before its call begins is text, and need not be held back longer."""

MAX_SEARCHED_CHARS = 16 << 10
"""Text of an object that is no call, in which others are searched for. Longer ones are text as a whole: to search them
takes too long, and calls do not stand in long objects.
"""

MAX_KEY_CHARS = 256
"""Longer keys and names are none of a call's: the object is text."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)

State: TypeAlias = Literal["open", "key", "colon", "value", "comma", "ended", "failed"]


class Progress(NamedTuple):
    """What a piece of text made known: the name as soon as the call begins, and more of its arguments."""

    name: str | None
    arguments: str
    rest: str


class JsonCall:
    """One call, whose text comes in pieces. It begins when its name and the beginning of its arguments are known.

    ``state``: ``ended``: the rest of the text is behind it; ``failed``: it is no call of one of ``names``, and ``raw``
    is all of its text. A call that has begun never fails: what is wrong behind its arguments ends it.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self.state: State = "open"
        self.begun = False
        self._raw: list[str] = []
        self._text = ""
        self._key = ""
        self._name: str | None = None
        self._scanner: ValueScanner | None = None
        self._held: list[str] = []
        self._arguments: list[str] = []
        self._has_arguments = False
        self._is_object = False

    @property
    def raw(self) -> str:
        """All text of a call that has not begun."""
        return "".join(self._raw)

    def searched(self) -> tuple[str, str]:
        """Return the text of a call that has failed: what is text, and what may still have calls."""
        raw = self.raw
        num_read = len(raw) - len(self._text)
        return ("", raw) if num_read <= MAX_SEARCHED_CHARS else (raw[:num_read], self._text)

    def push(self, text: str) -> Progress:
        """Take in text."""
        if not self.begun:
            self._raw.append(text)
        had_begun = self.begun
        self._text += text
        while self.state not in ("ended", "failed") and self._step():
            pass
        if self.state == "ended" and not self.begun:
            self._end()
        arguments = "".join(self._arguments) if self.begun else ""
        if self.begun:
            self._arguments.clear()
            self._raw.clear()
        rest = ""
        if self.state == "ended":
            rest, self._text = self._text, ""
        return Progress(self._name if self.begun and not had_begun else None, arguments, rest)

    def _step(self) -> bool:
        """Read what comes next; return whether anything could be read."""
        if self.state == "value":
            return self._value()
        self._text = self._text.lstrip()
        if not self._text:
            return False
        if self.state == "key":
            return self._read_key()
        char, self._text = self._text[0], self._text[1:]
        match self.state, char:
            case "open", "{":
                self.state = "key"
            case "colon", ":":
                self.state = "value"
            case "comma", ",":
                self.state = "key"
            case ("comma", "}"):
                self.state = "ended"
            case _:
                self._break(char)
        return True

    def _read_key(self) -> bool:
        match = _STRING.match(self._text)
        if match is not None and match.end() <= MAX_KEY_CHARS:
            self._key, self._text = match[0][1:-1], self._text[match.end() :]
            self.state = "colon" if self.begun or self._key in _KEYS else "failed"
            return True
        if self._text[0] == "}" and self._name is not None:
            self._text = self._text[1:]
            self.state = "ended"
            return True
        if self._text[0] == '"' and len(self._text) < MAX_KEY_CHARS:
            return False
        self._break("")
        return True

    def _value(self) -> bool:
        if self._scanner is None:
            self._text = self._text.lstrip()
            if not self._text:
                return False
            self._scanner = ValueScanner()
            self._is_object = self._text[0] == "{"
        end = self._scanner.push(self._text)
        piece, self._text = (self._text, "") if end is None else (self._text[:end], self._text[end:])
        if self._key in ARGUMENTS and self._is_object and not self._has_arguments:
            self._arguments.append(piece)
            if self._name is not None:
                self.begun = True
        else:
            self._held.append(piece)
            over = sum(map(len, self._held)) - MAX_KEY_CHARS if self._key == "name" and self._name is None else 0
            if over > 0:
                self._text = piece[-over:] + self._text
                self.state = "failed"
                return False
        if end is None:
            return False
        self._finish_value(self._scanner)
        return True

    def _finish_value(self, scanner: ValueScanner) -> None:
        """Take in the whole value of a key."""
        self._scanner = None
        self.state = "comma"
        value = "".join(self._held)
        self._held.clear()
        if scanner.broken:
            self._break("")
        elif self._key == "name" and self._name is None:
            self._name = _string(value)
            if self._name not in self._names:
                self.state = "failed"
            elif self._arguments:
                self.begun = True
        elif self._key in ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            if not self._is_object:
                self._arguments.append(_object(value))
                if not self._arguments[-1]:
                    self.state = "failed"
                self.begun |= self._name is not None and self.state != "failed"

    def _break(self, char: str) -> None:
        """Something is wrong: the call ends here if it has begun, else it is none."""
        self._text = char + self._text
        self.state = "ended" if self.begun else "failed"

    def _end(self) -> None:
        """The object has ended and the call has not begun: it has no arguments, or no name."""
        if self._name is None:
            self.state = "failed"
            return
        self.begun = True
        self._arguments = self._arguments or ["{}"]


def _string(value: str) -> str | None:
    """Return the text of a JSON string, None for anything else."""
    try:
        text = json.loads(value)
    except ValueError:
        return None
    return text if isinstance(text, str) else None


def _object(value: str) -> str:
    """Return the arguments that are no object: encoded in a string once more, or null; nothing for anything else."""
    if value == "null":
        return "{}"
    text = (_string(value) or "").strip()
    return text if text.startswith("{") else ""
