"""Renders chat messages to the prompt text of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvrelay.errors import InvalidRequestError
from router.text.chat_messages import Message, MessageForms

_END_MARK = "\u241fend of the message to continue\u241f"
"""Put behind a message that is to be continued, to find its end in the rendered prompt.

A space follows it: if that is gone, the template trims messages, and would have trimmed this one.
"""

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""Exceptions of a template for unsupported messages."""


class ChatTemplate:
    """A checkpoint's Jinja chat template, with the helpers such templates expect; it runs in Jinja's sandbox.

    ``special_tokens``: names such as ``bos_token`` to the text of the token.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # the optimizer takes seconds for an expression with hundreds of levels
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)
        self._forms = MessageForms(self._try)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text for ``messages`` (each with ``role`` and ``content``).

        ``continue_final_message`` leaves the last message open. ``variables`` are further ones for the template. Raises
        InvalidRequestError if one of them is a special token's, which is the checkpoint's, or if the template refuses
        the messages or has no use for the last one.
        """
        for name in self._special_tokens.keys() & (variables or {}).keys():
            raise InvalidRequestError(f"{name} is the checkpoint's and cannot be set", param="chat_template_kwargs")
        shown = [self._forms.fit(message) for message in messages]
        final = shown[-1].get("content")
        if continue_final_message:
            shown[-1]["content"] = _left_open(final)
        context = {**(variables or {}), "add_generation_prompt": add_generation_prompt}
        try:
            text = self._render_all(shown, context)
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        return _without_the_end(text, _last_text(final)) if continue_final_message else text

    def _render_all(self, messages: list[Message], context: Mapping[str, Any]) -> str:
        """Render ``messages``. If the template needs content, missing content is replaced by an empty text."""
        try:
            return self._render(messages, context)
        except (jinja2.UndefinedError, TypeError):
            if all("content" in message for message in messages):
                raise
            return self._render([self._forms.fit({"content": "", **message}) for message in messages], context)

    def _render(self, messages: list[Message], context: Mapping[str, Any]) -> str:
        defaults = {**self._special_tokens, "tools": None, "documents": None}
        return self._template.render({**defaults, **context, "messages": messages})

    def _try(self, messages: list[Message]) -> str | None:
        try:
            return self._render(messages, {"add_generation_prompt": False})
        except _TEMPLATE_ERRORS:
            return None


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks output for training. Here only its content is rendered."""

    tags = {"generation"}  # noqa: RUF012 (declared as a plain set by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Replace the block by its body in its own scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _left_open(content: str | list[Any] | None) -> str | list[Any]:
    """Return a message's content with the mark after its last text."""
    if content is None or content == []:
        raise InvalidRequestError(
            "continue_final_message: the last message has no content", param="continue_final_message"
        )
    marked = f"{_last_text(content)}{_END_MARK} "
    return marked if isinstance(content, str) else [*content[:-1], {**content[-1], "text": marked}]


def _last_text(content: str | list[Any] | None) -> str:
    if isinstance(content, list):
        return str(content[-1]["text"]) if content else ""
    return content or ""


def _without_the_end(prompt: str, final: str) -> str:
    """Return ``prompt`` up to the end of ``final``, the text to continue. Raises InvalidRequestError without it."""
    before, mark, behind = prompt.rpartition(_END_MARK)
    if not mark or final.strip() not in before:
        raise InvalidRequestError(
            "continue_final_message: the chat template does not show the last message as it is",
            param="continue_final_message",
        )
    return before if behind.startswith(" ") else before.rstrip()


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which models have not seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
