"""Reasoning between ``<think>`` and ``</think>``, before the answer."""

from __future__ import annotations

from router.tools.parts import Part, Reasoning, Text
from router.tools.text_scan import MarkScanner, Trimmer

BEGIN, END = "<think>", "</think>"


class ThinkParser:
    """A ``parts.Parser``. Blanks at both ends of the reasoning and before the answer are dropped.

    ``is_open``: the prompt ends with the begin mark. Else only an output that begins with it has reasoning.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._head: str | None = None if is_open else ""
        """The output so far while it may still begin with the mark."""
        self._in_reasoning = is_open
        self._scanner = MarkScanner([END])
        self._trimmer = Trimmer(trim_start=True)
        self._trims_answer = False

    def push(self, text: str) -> list[Part]:
        if self._head is not None:
            text = self._after_head(self._head + text)
        parts: list[Part] = []
        if self._in_reasoning:
            text = self._reason(text, parts)
        self._answer(text, parts)
        return parts

    def finish(self) -> list[Part]:
        if self._head is not None:
            return [Text(self._head)] if self._head else []
        if not self._in_reasoning:
            return []
        rest = self._trimmer.push(self._scanner.flush())
        return [Reasoning(rest)] if rest else []

    def _after_head(self, text: str) -> str:
        """Return the text behind the begin mark, or all of it if it does not begin with one."""
        begun = text.lstrip()
        if BEGIN.startswith(begun):
            self._head = text
            if begun != BEGIN:
                return ""
        self._head = None
        if not begun.startswith(BEGIN):
            return text
        self._in_reasoning = True
        return begun[len(BEGIN) :]

    def _reason(self, text: str, parts: list[Part]) -> str:
        """Add the reasoning in ``text`` to ``parts``; return the text behind it."""
        before, mark, behind = self._scanner.push(text)
        shown = self._trimmer.push(before)
        if shown:
            parts.append(Reasoning(shown))
        if mark is not None:
            self._in_reasoning = False
            self._trims_answer = True
        return behind

    def _answer(self, text: str, parts: list[Part]) -> None:
        if self._trims_answer:
            text = text.lstrip()
            self._trims_answer = not text
        if text:
            parts.append(Text(text))
