"""Calls as a list of Python: the output is ``[f(a=1, b="x"), g()]``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from router.tools.calls import CallWriter, NewId
from router.tools.parts import Part
from router.tools.python_values import PythonValue

BEGIN, END = "<|python_start|>", "<|python_end|>"

_MAX_HEAD_CHARS = 256
_CALL = re.compile(r"\s*([\w.:/-]+)\s*\(")
_KEY = re.compile(r"\s*([^\W\d]\w*)\s*=")
_PARTIAL_CALL = re.compile(r"\s*[\w.:/-]*\s*")
_PARTIAL_KEY = re.compile(r"\s*(?:[^\W\d]\w*)?\s*")


class PythonicParser:
    """A ``parts.Parser``. Only an output that begins with a list of calls has calls; what is wrong in it ends them."""

    def __init__(self, names: Collection[str], new_id: NewId) -> None:
        self._writer = CallWriter(names, new_id)
        self._read: Callable[[str], str] = self._begin
        self._held = ""
        """Text that was not read yet: the beginning of something."""
        self._opening = ""
        self._value = PythonValue()
        self._num_arguments = 0

    def push(self, text: str) -> list[Part]:
        text = self._held + text
        while text:
            reader = self._read
            rest = reader(text)
            if rest == text and self._read == reader:
                break  # it waits for more
            text = rest
        self._held = text
        return self._writer.take()

    def finish(self) -> list[Part]:
        if self._read not in (self._argument, self._in_value):
            self._writer.text(self._opening + self._held)
        return self._writer.finish()

    def _begin(self, text: str) -> str:
        begun = text.lstrip()
        if BEGIN.startswith(begun) and begun != BEGIN:
            return text
        begun = begun.removeprefix(BEGIN).lstrip()
        if not begun:
            return text
        if begun[0] != "[":
            return self._text(text)
        self._opening = text[: len(text) - len(begun) + 1]
        self._read = self._name
        return begun[1:]

    def _text(self, text: str) -> str:
        """From here on all is text."""
        self._writer.text(self._opening)
        self._opening = ""
        self._read = self._in_text
        return text

    def _in_text(self, text: str) -> str:
        self._writer.text(text)
        return ""

    def _name(self, text: str) -> str:
        match = _CALL.match(text)
        if match is not None and match.end() <= _MAX_HEAD_CHARS and match[1] in self._writer.names:
            self._opening = ""
            self._writer.begin(match[1])
            self._writer.arguments("{")
            self._num_arguments = 0
            self._read = self._argument
            return text[match.end() :]
        if _PARTIAL_CALL.fullmatch(text) and len(text) <= _MAX_HEAD_CHARS:
            return text
        return self._text(text)

    def _argument(self, text: str) -> str:
        """Read the name of an argument, or the end of the call."""
        match = _KEY.match(text)
        if match is not None and match.end() <= _MAX_HEAD_CHARS:
            comma = ", " if self._num_arguments else ""
            self._writer.arguments(f"{comma}{json.dumps(match[1], ensure_ascii=False)}: ")
            self._num_arguments += 1
            self._value = PythonValue()
            self._read = self._in_value
            return text[match.end() :]
        if text.lstrip().startswith(")"):
            return self._end_call(text)
        if _PARTIAL_KEY.fullmatch(text) and len(text) <= _MAX_HEAD_CHARS:
            return text
        return self._text(text)

    def _in_value(self, text: str) -> str:
        rest = self._value.push(text)
        self._writer.arguments(self._value.take())
        if self._value.state == "failed":
            return self._text(rest)
        if self._value.state == "ended":
            self._read = self._behind_value
            return rest
        return rest

    def _behind_value(self, text: str) -> str:
        text = text.lstrip()
        if not text:
            return ""
        if text[0] == ",":
            self._read = self._argument
            return text[1:]
        return self._end_call(text) if text[0] == ")" else self._text(text)

    def _end_call(self, text: str) -> str:
        self._writer.arguments("}")
        self._read = self._between
        return text.lstrip()[1:]

    def _between(self, text: str) -> str:
        text = text.lstrip()
        if not text:
            return ""
        if text[0] == ",":
            self._read = self._name
            return text[1:]
        if text[0] != "]":
            return self._text(text)
        self._read = self._behind
        return text[1:]

    def _behind(self, text: str) -> str:
        """Drop the end mark."""
        begun = text.lstrip()
        if END.startswith(begun) and begun != END:
            return text
        return self._text(begun.removeprefix(END))
