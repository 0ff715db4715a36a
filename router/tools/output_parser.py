"""Finds all parts of an output: reasoning first, calls in what follows."""

from __future__ import annotations

from collections.abc import Iterable

from router.tools.parts import CallArguments, CallBegun, Parser, Part, Text, merged

_PIECE_CHARS = 1024
"""Parsers copy the rest of a text for each of its tokens, so a long one comes in pieces."""


class OutputParser:
    """A ``parts.Parser`` of up to two: ``calls`` gets the text that ``reasoning`` leaves.

    ``has_calls``: a call has begun. ``with_reasoning``: reasoning is shown; ``parallel``: more calls than one are.
    """

    def __init__(
        self,
        reasoning: Parser | None,
        calls: Parser | None,
        *,
        with_reasoning: bool = True,
        parallel: bool = True,
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._with_reasoning = with_reasoning
        self._parallel = parallel
        self.has_calls = False

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            parts += self._behind_reasoning(self._reasoning.push(piece) if self._reasoning else [Text(piece)])
        return self._noted(parts)

    def finish(self) -> list[Part]:
        parts = self._behind_reasoning(self._reasoning.finish()) if self._reasoning else []
        return self._noted(parts + self._calls.finish() if self._calls else parts)

    def _behind_reasoning(self, found: Iterable[Part]) -> list[Part]:
        """Return ``found`` with what the other parser makes of its text."""
        parts: list[Part] = []
        for part in found:
            if isinstance(part, Text) and self._calls is not None:
                parts += self._calls.push(part.text)
            elif isinstance(part, Text) or self._with_reasoning:
                parts.append(part)
        return parts

    def _noted(self, parts: list[Part]) -> list[Part]:
        self.has_calls = self.has_calls or any(isinstance(part, CallBegun) for part in parts)
        return [part for part in merged(parts) if part != Text("") and (self._parallel or not _is_later_call(part))]


def _is_later_call(part: Part) -> bool:
    return isinstance(part, CallBegun | CallArguments) and part.index > 0
