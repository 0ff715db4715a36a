"""How the outputs of one chat request are parsed: what the request asks for, in the formats of the model."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.errors import InvalidRequestError
from router.model import ServedModel
from router.openai.schemas import ChatCompletionRequest
from router.openai.tool_fields import ToolUse
from router.tools.formats import FAMILIES, ToolFamily
from router.tools.output_parser import OutputParser
from router.tools.reasoning import BEGIN, ThinkParser

_TAIL_TOKENS = 16
"""In the last so many tokens of a prompt the begin mark of reasoning is found, and blanks behind it."""


class Parsing:
    """Makes a parser for each output. ``shown_ids``: special tokens that the parsers must see."""

    def __init__(self, request: ChatCompletionRequest, model: ServedModel) -> None:
        self.shown_ids = model.mark_ids
        self._model = model
        self._use = request.tool_use
        self._with_reasoning = request.include_reasoning is not False

    def parser(self, prompt: Sequence[int]) -> OutputParser:
        """Return the parser of one output for ``prompt``."""
        family = output_family(self._model, self._use) if self._use is not None else None
        calls = family.parser(self._use.names, family.new_id) if family is not None and self._use is not None else None
        reasoning = ThinkParser(is_open=self._is_open(prompt)) if self._model.reasons else None
        return OutputParser(
            reasoning,
            calls,
            with_reasoning=self._with_reasoning,
            parallel=self._use is None or self._use.parallel,
        )

    def _is_open(self, prompt: Sequence[int]) -> bool:
        """Return whether ``prompt`` ends with the begin of reasoning, which some chat templates put there."""
        return prompt_tail(self._model, prompt).endswith(BEGIN)


def prompt_tail(model: ServedModel, prompt: Sequence[int]) -> str:
    """Return the end of the text of ``prompt``, without blanks at its end."""
    return model.tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special_tokens=False).rstrip()


def output_family(model: ServedModel, use: ToolUse) -> ToolFamily | None:
    """Return the format of the calls in the output, None: there is none.

    A call that must come is in the model's own format if there is a grammar of that, else as Llama 3 writes it.
    """
    family = model.tool_family
    if use.mode != "auto" and (family is None or not family.has_grammar):
        return FAMILIES["llama3"]
    return family


def parsing_of(request: ChatCompletionRequest, model: ServedModel) -> Parsing | None:
    """Return how the outputs are parsed; None: they are all content."""
    return Parsing(request, model) if model.reasons or request.tool_use is not None else None


def check_tool_use(request: ChatCompletionRequest, model: ServedModel) -> None:
    """Raise InvalidRequestError if the output cannot be what ``tools`` and ``tool_choice`` ask for."""
    use = request.tool_use
    if use is None:
        return
    if model.tool_family is None and use.mode == "auto":
        raise InvalidRequestError(
            "tools: the model's chat template has no known format of tool calls (router.tool_parser)", param="tools"
        )
