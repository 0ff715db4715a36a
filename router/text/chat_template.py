"""Chat messages to the prompt text a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvrelay.core.errors import InvalidRequestError

_END_MARK = "\u241fend of the message to continue\u241f"
"""Put behind a message that is to be continued, to find its end in the rendered prompt.

A space follows it: if that is gone, the template trims messages, and would have trimmed this one.
"""


class ChatTemplate:
    """A checkpoint's Jinja chat template, with the helpers such templates expect; it runs in Jinja's sandbox.

    ``special_tokens``: names such as ``bos_token`` to the text of the token.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

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
        InvalidRequestError if the template refuses the messages or has no use for the last one.
        """
        shown = [dict(message) for message in messages]
        if continue_final_message:
            shown[-1]["content"] = f"{shown[-1]['content']}{_END_MARK} "
        context = {**self._special_tokens, "tools": None, "documents": None, **(variables or {})}
        try:
            text = self._template.render(
                **context | {"messages": shown, "add_generation_prompt": add_generation_prompt}
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        return _without_the_end(text) if continue_final_message else text


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what a model wrote, for training; here its content is all that matters."""

    tags = {"generation"}  # noqa: RUF012 (declared as a plain set by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Take the block's body in place of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _without_the_end(text: str) -> str:
    """Return ``text`` up to the end of the message to continue."""
    before, mark, behind = text.rpartition(_END_MARK)
    if not mark:
        raise InvalidRequestError(
            "continue_final_message: the chat template does not show the last message as it is",
            param="continue_final_message",
        )
    return before if behind.startswith(" ") else before.rstrip()


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which models have not seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
