"""Errors in Anthropic's format."""

from __future__ import annotations

import re

from router.openai.errors import AnswerError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_NAMES = tuple(
    (re.compile(rf"^{name}"), there)
    for name, there in (
        (r"response_format\.json_schema\b", "output_config.format"),
        (r"response_format\b", "output_config.format"),
        (r"reasoning_effort\b", "output_config.effort"),
        (r"stop\b", "stop_sequences"),
        (r"(tools\.\d+)\.function\.parameters\b", r"\1.input_schema"),
        (r"(tools\.\d+)\.function\b", r"\1"),
        (r"(tools\.\d+: )function\.parameters", r"\1input_schema"),
        (r"(tools\.\d+: )function\.", r"\1"),
    )
)
"""Paths of fields of chat completions, and the same here."""


def anthropic_error(error: AnswerError) -> dict[str, object]:
    """Return the body of an error, or of the event ``error``: ``{"type": "error", "error": {"type", "message"}}``."""
    message = renamed(error.error.message)
    if error.error.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # by which clients recognize it
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def renamed(text: str) -> str:
    """Return ``text`` with the path at its beginning as it is here."""
    for name, there in _NAMES:
        text = name.sub(there, text, count=1)
    return text
