"""Converts the literals of Python to JSON while they arrive."""

from __future__ import annotations

import json
import re

_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:\.\d*)?(?:[eE][+-]?\d+)?|[+-]?\.\d+(?:[eE][+-]?\d+)?")
_MAX_WORD_CHARS = 64
_WORD = re.compile(r"[\w.+-]*")
_PLAIN = {quote: re.compile(rf"[^\\{quote}]*") for quote in "'\""}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_HEX = re.compile("[0-9a-fA-F]+")
_CLOSES = {"[": "]", "(": "]", "{": "}"}


class PythonValue:
    """One value: a string, number, True, False, None, list, tuple or dict with strings as keys.

    ``state``: ``ended``, the rest of the text is behind it, or ``failed``.
    """

    def __init__(self) -> None:
        self.state = "open"
        self._out: list[str] = []
        self._stack: list[str] = []
        self._quote = ""
        self._expects = "value"

    def take(self) -> str:
        """Return the JSON made since the last time."""
        out = "".join(self._out)
        self._out.clear()
        return out

    def push(self, text: str) -> str:
        """Read ``text``; return what is not read: the beginning of a token, or what is behind the value."""
        while self.state == "open":
            rest = self._string(text) if self._quote else self._token(text.lstrip())
            if rest is None:
                return text
            text = rest
        return text

    def _token(self, text: str) -> str | None:
        """Read one token; None: there is none, or it is not complete."""
        if not text:
            return None
        char = text[0]
        if self._expects in ("comma", "colon"):
            return self._separator(char, text[1:])
        if char in "]})":
            return self._close(char, text[1:])
        if char in "'\"":
            self._begin_item()
            self._quote = char
            self._out.append('"')
            return text[1:]
        if self._expects in ("key", "first key"):
            return self._fail(text)
        return self._open(char, text[1:]) if char in _CLOSES else self._word(text)

    def _open(self, char: str, rest: str) -> str:
        """Begin a list, tuple or dict."""
        self._begin_item()
        self._stack.append(char)
        self._out.append("[" if char == "(" else char)
        self._expects = "first key" if char == "{" else "first"
        return rest

    def _begin_item(self) -> None:
        """Write the comma before an item: only now it is clear that one comes."""
        if self._expects in ("item", "key"):
            self._out.append(", ")

    def _end_item(self) -> None:
        if not self._stack:
            self.state = "ended"
        elif self._stack[-1] == "{" and self._expects in ("key", "first key"):
            self._expects = "colon"
        else:
            self._expects = "comma"

    def _separator(self, char: str, rest: str) -> str:
        if char == ":" and self._expects == "colon":
            self._out.append(": ")
            self._expects = "value"
            return rest
        if char == "," and self._expects == "comma":
            self._expects = "key" if self._stack[-1] == "{" else "item"
            return rest
        if self._expects == "comma" and char in "]})":
            return self._close(char, rest)
        return self._fail(char + rest)

    def _close(self, char: str, rest: str) -> str:
        opened = self._stack[-1] if self._stack else ""
        fits = {"[": "]", "(": ")", "{": "}"}.get(opened) == char and self._expects not in ("value", "colon")
        if not fits:
            return self._fail(char + rest)
        self._out.append(_CLOSES[self._stack.pop()])
        self._expects = "value"
        self._end_item()
        return rest

    def _word(self, text: str) -> str | None:
        match = _WORD.match(text)
        assert match is not None
        if match.end() == len(text) and len(text) <= _MAX_WORD_CHARS:
            return None
        word = _WORDS.get(match[0]) if match.end() <= _MAX_WORD_CHARS else None
        if word is None and match.end() <= _MAX_WORD_CHARS and _NUMBER.fullmatch(match[0]):
            word = _json_number(match[0])
        if word is None:
            return self._fail(text)
        self._begin_item()
        self._out.append(word)
        self._end_item()
        return text[match.end() :]

    def _string(self, text: str) -> str | None:
        """Read a part of a string."""
        match = _PLAIN[self._quote].match(text)
        assert match is not None
        self._write(match[0])
        text = text[match.end() :]
        if not text:
            return None if not match[0] else ""
        if text[0] == "\\":
            return self._escape(text)
        self._quote = ""
        self._out.append('"')
        self._end_item()
        return text[1:]

    def _escape(self, text: str) -> str | None:
        if len(text) < 2:
            return None
        kind = text[1]
        digits = _HEX_DIGITS.get(kind)
        if digits is None:
            self._write(_ESCAPES.get(kind, kind if kind in "'\"\\" else text[:2]))
            return text[2:]
        if len(text) < 2 + digits:
            return None
        code = text[2 : 2 + digits]
        if not _HEX.fullmatch(code) or int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
            return self._fail(text)
        self._write(chr(int(code, 16)))
        return text[2 + digits :]

    def _write(self, text: str) -> None:
        if text:
            self._out.append(json.dumps(text, ensure_ascii=False)[1:-1])

    def _fail(self, rest: str) -> str:
        self.state = "failed"
        return rest


def _json_number(text: str) -> str:
    """Return a number of Python's as JSON has it: without plus, with digits around the point."""
    sign, digits = ("-", text[1:]) if text[0] == "-" else ("", text.lstrip("+"))
    whole, point, rest = digits.partition(".")
    if point and not rest[:1].isdigit():
        rest = "0" + rest
    return f"{sign}{whole or '0'}{point}{rest}"
