"""Calls of Mistral: ``[TOOL_CALLS]`` before a list ``[{"name": ..., "arguments": {...}}]`` or ``name[ARGS]{...}``."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from router.tools.calls import CallWriter, NewId
from router.tools.json_call import JsonCall
from router.tools.parts import Part
from router.tools.text_scan import MarkScanner, ValueScanner

BEGIN, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"

_MAX_HEAD_CHARS = 256
_NAMED = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")


class MistralParser:
    """A ``parts.Parser``. Text before and behind calls is content. Both forms are read."""

    def __init__(self, names: Collection[str], new_id: NewId) -> None:
        self._writer = CallWriter(names, new_id)
        self._scanner = MarkScanner([BEGIN])
        self._read: Callable[[str], str] = self._in_text
        self._raw = ""
        """The text behind the mark while no call has begun there."""
        self._call = JsonCall(())
        self._arguments = ValueScanner()

    def push(self, text: str) -> list[Part]:
        while text:
            text = self._read(text)
        return self._writer.take()

    def finish(self) -> list[Part]:
        self._writer.text(self._scanner.flush())
        if self._read == self._behind_mark:
            self._writer.text(BEGIN + self._raw)
        elif self._read == self._in_call and not self._call.begun:
            self._writer.text(self._raw + self._call.raw)
        elif self._read == self._between:
            self._writer.text(self._raw)
        return self._writer.finish()

    def _in_text(self, text: str) -> str:
        before, mark, behind = self._scanner.push(text)
        self._writer.text(before)
        if mark is not None:
            self._raw = ""
            self._read = self._behind_mark
        return behind

    def _behind_mark(self, text: str) -> str:
        """Find out which form it is."""
        self._raw += text
        begun = self._raw.lstrip()
        if begun.startswith("["):
            self._raw = BEGIN + self._raw[: -len(begun)] + "["
            self._read = self._between
            return begun[1:]
        if begun.startswith("{"):
            self._raw = BEGIN
            self._begin_call()
            return begun
        head = _NAMED.match(self._raw)
        if head is not None and head.end() <= _MAX_HEAD_CHARS and head[1] in self._writer.names:
            rest, self._raw = self._raw[head.end() :], ""
            self._writer.begin(head[1])
            self._arguments = ValueScanner()
            self._read = self._in_arguments
            return rest
        if "{" in self._raw or len(self._raw) > _MAX_HEAD_CHARS:
            self._writer.text(BEGIN)
            self._read = self._in_text
            return self._raw
        return ""

    def _in_arguments(self, text: str) -> str:
        end = self._arguments.push(text)
        self._writer.arguments(text[:end])
        if end is None:
            return ""
        self._read = self._in_text
        return text[end:]

    def _between(self, text: str) -> str:
        """Read what is between the calls of a list, and its end."""
        begun = text.lstrip(", \t\r\n")
        if self._raw:
            self._raw += text[: len(text) - len(begun)]
        text = begun
        if not text:
            return ""
        if text[0] == "{":
            self._begin_call()
            return text
        self._read = self._in_text
        if text[0] == "]" and not self._raw:
            return text[1:]
        self._writer.text(self._raw)
        return text

    def _begin_call(self) -> None:
        self._call = JsonCall(self._writer.names)
        self._read = self._in_call

    def _in_call(self, text: str) -> str:
        rest = self._writer.advance(self._call, text)
        if rest is None:
            return ""
        if self._call.state == "failed":
            self._read = self._in_text
            return self._writer.no_call(self._raw, self._call)
        self._read = self._between
        self._raw = ""
        return rest
