"""Converts chat messages to the form that a chat template expects.

Clients send a message's content as text or as a list of parts, and templates take one of the two, or both. Which ones
is found out when a template is loaded, by rendering messages that hold a mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from kvrelay.errors import InvalidRequestError

Message = dict[str, Any]
Render = Callable[[list[Message]], str | None]
"""Returns the prompt for messages, or None if the template refuses them."""

_ROLES = ("user", "assistant", "system", "developer", "tool")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "8046519273"  # digits: upper(), title() and the like leave them as they are
_PRINTED_PART = re.compile(rf"""text\\*['"]\s*:\s*\\*['"]{_MARK}""")
"""Matches a part printed as an object: it contains the text, but the template does not accept parts."""

_USER: Message = {"role": "user", "content": "x"}
_SYSTEM: Message = {"role": "system", "content": "x"}
_ANSWER: Message = {"role": "assistant", "content": "x"}
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}
_CALLER: Message = {"role": "assistant", "tool_calls": [_CALL]}
_BEFORE: tuple[list[Message], ...] = (
    [],
    [_USER],
    [_SYSTEM],
    [_SYSTEM, _USER],
    [_USER, _CALLER],
    [_SYSTEM, _USER, _CALLER],
)
_BEHIND: tuple[list[Message], ...] = ([], [_USER], [_ANSWER])
"""Messages that some templates require before and after a message."""


class ContentForms(NamedTuple):
    """The forms of content that a template renders for one role."""

    text: bool
    parts: bool


class MessageForms:
    """The forms of messages that one template accepts. ``render`` renders the template."""

    def __init__(self, render: Render) -> None:
        self._forms = {role: _forms(render, role) for role in _ROLES}

    def fit(self, message: Mapping[str, Any]) -> Message:
        """Return ``message`` in the form that the template accepts.

        What is null or empty without meaning is left out, as transformers does. A ``developer`` is a ``system`` for a
        template that does not know it. Raises InvalidRequestError if that is unknown as well.
        """
        fitted = {key: value for key, value in message.items() if value is not None}
        if fitted.get("tool_calls") == []:
            del fitted["tool_calls"]
        fitted["role"] = self._role(fitted["role"])
        if "content" in fitted:
            fitted["content"] = self._content(fitted["role"], fitted["content"])
        return _with_reasoning(fitted)

    def _role(self, role: str) -> str:
        if role != "developer" or any(self._forms[role]):
            return role
        if any(self._forms["system"]):
            return "system"
        raise InvalidRequestError(
            "messages: the chat template has no place for messages of role 'developer' or 'system'", param="messages"
        )

    def _content(self, role: str, content: str | Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
        forms = self._forms.get(role, self._forms["user"])
        if isinstance(content, str):
            return content if forms.text or not forms.parts else [{"type": "text", "text": content}]
        return list(content) if forms.parts else "\n".join(part["text"] for part in content)


def _with_reasoning(message: Message) -> Message:
    """Return ``message`` with its reasoning under the names that templates use, as in transformers."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _forms(render: Render, role: str) -> ContentForms:
    return ContentForms(
        text=_shows(render, role, _MARK),
        parts=_shows(render, role, [{"type": "text", "text": _MARK}]),
    )


def _shows(render: Render, role: str, content: object) -> bool:
    """Return whether the template renders ``content`` in a message of ``role``."""
    message = {"role": role, "content": content, "tool_call_id": "abcdefghi", "name": "f"}
    # A template that takes a developer for an answer has no place for one at the beginning, where they stand.
    places = product([[]] if role == "developer" else _BEFORE, _BEHIND)
    prompts = (render([*before, message, *behind]) for before, behind in places)
    return any(prompt and _MARK in prompt and not _PRINTED_PART.search(prompt) for prompt in prompts)
