"""Calls of Hermes and Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, one after another."""

from __future__ import annotations

from collections.abc import Collection

from router.tools.calls import CallWriter, NewId
from router.tools.json_call import JsonCall
from router.tools.parts import Part
from router.tools.text_scan import MarkScanner

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser:
    """A ``parts.Parser``. Text before, between and behind calls is content."""

    def __init__(self, names: Collection[str], new_id: NewId) -> None:
        self._writer = CallWriter(names, new_id)
        self._scanner = MarkScanner([BEGIN])
        self._call: JsonCall | None = None
        self._tail: str | None = None
        """What may be the end mark of a call so far; None: no call has just ended."""

    def push(self, text: str) -> list[Part]:
        while text:
            text = self._in_call(text, self._call) if self._call is not None else self._in_text(text)
        return self._writer.take()

    def finish(self) -> list[Part]:
        if self._call is not None and not self._call.begun:
            self._writer.text(BEGIN + self._call.raw)
        self._writer.text(self._scanner.flush())
        if self._tail is not None and not END.startswith(self._tail):
            self._writer.text(self._tail)
        return self._writer.finish()

    def _in_call(self, text: str, call: JsonCall) -> str:
        """Return what is left of ``text`` when the call is over."""
        rest = self._writer.advance(call, text)
        if rest is None:
            return ""
        self._call = None
        if call.state == "failed":
            return self._writer.no_call(BEGIN, call)
        self._tail = ""
        return rest

    def _in_text(self, text: str) -> str:
        if self._tail is not None:
            return self._behind_call(text)
        before, mark, behind = self._scanner.push(text)
        self._writer.text(before)
        if mark is not None:
            self._call = JsonCall(self._writer.names)
        return behind

    def _behind_call(self, text: str) -> str:
        """Drop the end mark, and brackets too many before it. Any other text behind a call is content."""
        assert self._tail is not None
        text = (self._tail + text).lstrip("}] \t\r\n")
        if text.startswith(END):
            self._tail = None
            return text[len(END) :]
        if END.startswith(text):
            self._tail = text
            return ""
        self._tail = None
        return text
