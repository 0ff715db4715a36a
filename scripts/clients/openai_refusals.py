"""A plug-in of pytest for the openai package's own tests: classes of failures, and bodies without what is refused.

Prints a line for each class of failures with their number: the server refused the endpoint or a field by name, or else
the error. With ``WITHOUT_REFUSED`` set, fields that the server refuses are taken out of the bodies (``REFUSED``), and
values that it refuses are replaced (``REPLACED``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai._base_client import BaseClient

REFUSED = {
    "/chat/completions": ("function_call", "functions", "moderation", "web_search_options"),
    "/completions": ("suffix",),
    "/responses": ("background", "context_management", "conversation", "moderation", "previous_response_id", "prompt"),
    "/responses/input_tokens": ("conversation", "personality", "previous_response_id"),
}
"""By path: fields that the server refuses by name. ``function_call`` needs ``functions``."""

REPLACED: dict[str, dict[str, object]] = {
    "/chat/completions": {"logit_bias": {"7": 0}, "max_completion_tokens": 8, "max_tokens": 8},
    "/completions": {"echo": False, "logit_bias": {"7": 0}},
    "/responses": {"prompt_cache_options": {"comparison_response_id": "resp_123", "mode": "implicit", "ttl": "30m"}},
    "/responses/input_tokens": {"model": "demo"},
}
"""By path: values for fields that have one that the server refuses.

The tests have the token id ``foo``, a maximum of 0 tokens, ``prewarm``, and a model called ``model``. ``echo`` with
``logprobs`` is not refused, but the package's types do not allow what OpenAI and vLLM answer: null for the first token.
"""

classes: Counter[str] = Counter()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[None]:
    """Count the failure."""
    yield
    if call.excinfo is not None:
        classes[_class_of(call.excinfo.value)] += 1


def _class_of(error: BaseException) -> str:
    if isinstance(error, openai.NotFoundError) and error.code == "unsupported_endpoint":
        return "endpoint refused"
    if isinstance(error, openai.BadRequestError) and error.param is not None:
        return "field refused"
    return f"{type(error).__name__}: {str(error)[:200]}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the classes."""
    for name, count in sorted(classes.items()):
        terminalreporter.write_line(f"CLASS {count} {name}")


def _without_refused(path: str, body: dict[str, Any]) -> dict[str, Any]:
    body = {name: value for name, value in body.items() if name not in REFUSED.get(path, ())}
    body |= {name: value for name, value in REPLACED.get(path, {}).items() if name in body}
    if not body.get("stream"):
        body.pop("stream_options", None)  # as OpenAI has it, they are only allowed with streams
    return body


def pytest_configure() -> None:
    """Change what the clients send."""
    if not os.environ.get("WITHOUT_REFUSED"):
        return
    build = BaseClient._build_request

    def build_without_refused(self: Any, options: Any, **more: Any) -> Any:
        if isinstance(options.json_data, dict):
            options = options.copy(update={"json_data": _without_refused(options.url, options.json_data)})
        return build(self, options, **more)

    BaseClient._build_request = build_without_refused  # type: ignore[method-assign]
