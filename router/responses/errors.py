"""Errors of ``/v1/responses``: OpenAI's, with the names that fields have there."""

from __future__ import annotations

import re

from router.openai.errors import AnswerError

_NAMES = tuple(
    (re.compile(rf"^{name}"), there)
    for name, there in (
        (r"messages\b", "input"),
        (r"max_completion_tokens\b", "max_output_tokens"),
        (r"response_format\.json_schema\b", "text.format"),
        (r"response_format\b", "text.format"),
        (r"reasoning_effort\b", "reasoning.effort"),
        (r"(tools\.\d+)\.function\b", r"\1"),
        (r"(tools\.\d+: )function\.", r"\1"),
    )
)
"""Paths of fields of chat completions, and the same here."""


def responses_error(error: AnswerError) -> dict[str, object]:
    """Return the body of an error."""
    body = error.body
    inner = body["error"]
    assert isinstance(inner, dict)
    message = renamed(inner["message"])
    param = None if inner["param"] is None else renamed(inner["param"]).partition(".")[0]
    return {"error": {**inner, "message": message, "param": param}}


def renamed(text: str) -> str:
    """Return ``text`` with the path at its beginning as it is here."""
    for name, there in _NAMES:
        text = name.sub(there, text, count=1)
    return text
