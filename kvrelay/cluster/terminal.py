"""The terminal, as the commands write to it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from kvrelay.printable import printable


class PlainConsole(Console):
    """A console for texts of others, such as names, errors and paths: nothing in a ``str`` is markup or a command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return ``text`` with its control characters escaped, but for line breaks and tabs."""
        return super().render_str(printable(text, keep="\n\t"), **options)
