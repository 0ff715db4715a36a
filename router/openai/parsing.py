"""How the outputs of one chat request are parsed: what the request asks for, in the formats of the model."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.errors import InvalidRequestError
from router.model import ServedModel
from router.openai.schemas import ChatCompletionRequest
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
        family, use = self._model.tool_family, self._use
        calls = family.parser(use.names, family.new_id) if family is not None and use is not None else None
        reasoning = ThinkParser(is_open=self._is_open(prompt)) if self._model.reasons else None
        return OutputParser(reasoning, calls, with_reasoning=self._with_reasoning)

    def _is_open(self, prompt: Sequence[int]) -> bool:
        """Return whether ``prompt`` ends with the begin of reasoning, which some chat templates put there."""
        tail = self._model.tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special_tokens=False)
        return tail.rstrip().endswith(BEGIN)


def parsing_of(request: ChatCompletionRequest, model: ServedModel) -> Parsing | None:
    """Return how the outputs are parsed; None: they are all content."""
    return Parsing(request, model) if model.reasons or request.tool_use is not None else None


def check_tool_use(request: ChatCompletionRequest, model: ServedModel) -> None:
    """Raise InvalidRequestError if the output cannot be what ``tools`` and ``tool_choice`` ask for."""
    use = request.tool_use
    if use is None:
        return
    if model.tool_family is None:
        raise InvalidRequestError(
            "tools: the model's chat template has no known format of tool calls (router.tool_parser)", param="tools"
        )
    if use.mode != "auto":
        raise InvalidRequestError("tool_choice: only 'none' and 'auto' are supported", param="tool_choice")
