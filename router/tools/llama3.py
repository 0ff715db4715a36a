"""Calls of Llama 3: the output is ``{"name": ..., "parameters": {...}}``, several with ``;`` between them."""

from __future__ import annotations

from collections.abc import Collection

from router.tools.calls import CallWriter, NewId
from router.tools.json_call import JsonCall
from router.tools.parts import Part

TAG = "<|python_tag|>"


class Llama3Parser:
    """A ``parts.Parser``. Only an output that begins with a call, or with the tag, has calls."""

    def __init__(self, names: Collection[str], new_id: NewId) -> None:
        self._writer = CallWriter(names, new_id)
        self._head: str | None = ""
        """The output so far while it may still begin with a call."""
        self._call: JsonCall | None = None
        self._is_text = False

    def push(self, text: str) -> list[Part]:
        if self._head is not None:
            text = self._begin(self._head + text)
        while text:
            text = self._go_on(text)
        return self._writer.take()

    def finish(self) -> list[Part]:
        if self._head is not None:
            self._writer.text(self._head)
        if self._call is not None and not self._call.begun:
            self._writer.text(self._call.raw)
        return self._writer.finish()

    def _begin(self, text: str) -> str:
        """Return the text behind blanks and the tag; all of it if it does not begin with a call."""
        begun = text.lstrip()
        if TAG.startswith(begun) and begun != TAG:
            self._head = text
            return ""
        self._head = None
        if begun.startswith((TAG, "{")):
            self._call = JsonCall(self._writer.names)
            return begun.removeprefix(TAG)
        self._is_text = True
        return text

    def _go_on(self, text: str) -> str:
        """Read ``text`` and return what is left of it."""
        if self._is_text:
            self._writer.text(text)
            return ""
        if self._call is None:
            text = text.lstrip("; \t\r\n")
            if not text:
                return ""
            self._is_text = not text.startswith("{")
            self._call = JsonCall(self._writer.names)
            return text
        rest = self._writer.advance(self._call, text)
        if rest is None:
            return ""
        if self._call.state == "failed":
            self._is_text = True
            rest = self._call.raw
        self._call = None
        return rest
