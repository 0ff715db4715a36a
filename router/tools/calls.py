"""What the parsers of all families of tool calls share."""

from __future__ import annotations

from collections.abc import Callable, Collection

from router.tools.json_call import JsonCall
from router.tools.parts import CallArguments, CallBegun, Part, Text
from router.tools.text_scan import Trimmer

NewId = Callable[[], str]
"""Returns the id of a new call."""


class CallWriter:
    """Makes parts of the text and the calls of one output. Blanks between a call and text are dropped."""

    def __init__(self, names: Collection[str], new_id: NewId) -> None:
        self.names = frozenset(names)
        self.num_calls = 0
        self._new_id = new_id
        self._trimmer = Trimmer(trim_start=False)
        self._ends_with_call = False
        self._parts: list[Part] = []

    def text(self, text: str) -> None:
        """Add text."""
        shown = self._trimmer.push(text)
        if shown:
            self._ends_with_call = False
            self._parts.append(Text(shown))

    def begin(self, name: str) -> None:
        """Begin a call of a tool."""
        self._trimmer.interrupt()
        self._ends_with_call = True
        self._parts.append(CallBegun(self.num_calls, self._new_id(), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Add to the arguments of the newest call."""
        if text:
            self._parts.append(CallArguments(self.num_calls - 1, text))

    def take(self) -> list[Part]:
        """Return the parts since the last time."""
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """Return the last parts."""
        blanks = self._trimmer.flush()
        if blanks and not self._ends_with_call:
            self._parts.append(Text(blanks))
        return self.take()

    def advance(self, call: JsonCall, text: str) -> str | None:
        """Give ``text`` to ``call`` and write what it makes of it.

        Return the text behind the call if it has ended; if it has failed, nothing: it is text, see ``no_call``. Else
        None.
        """
        name, arguments, rest = call.push(text)
        if name is not None:
            self.begin(name)
        self.arguments(arguments)
        return rest if call.state in ("ended", "failed") else None

    def no_call(self, before: str, call: JsonCall) -> str:
        """Add ``before``, and of a ``call`` that has failed what cannot have calls itself. Return the rest of it."""
        text, rest = call.searched()
        self.text(before + text)
        return rest
