"""Text of others for a terminal, which takes some characters as commands."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, marks that turn the direction of writing, and halves of surrogate pairs."""


def printable(text: str, *, keep: str = "") -> str:
    r"""Return ``text`` with each control character as an escape sequence such as ``\x1b``, except those in ``keep``."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
