"""The format of an error: that of the API that the request is for."""

from __future__ import annotations

from router.anthropic.errors import anthropic_error
from router.openai.errors import AnswerError
from router.responses.errors import responses_error


def error_body(error: AnswerError, path: str) -> dict[str, object]:
    """Return the body of the answer to a request for ``path``."""
    if path.startswith("/v1/messages"):
        return anthropic_error(error)
    return responses_error(error) if path.startswith("/v1/responses") else error.body
