"""The grammar of an output: structure that the client asks for, calls that must come, and reasoning before both."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvrelay.errors import InvalidRequestError
from kvrelay.protocol.request import Grammar, GrammarKind
from router.model import ServedModel
from router.openai.parsing import output_family, prompt_tail
from router.openai.schemas import ChatCompletionRequest
from router.openai.structured import MAX_GRAMMAR_BYTES, Structure, Wish, grammar_of, structure_of
from router.openai.tool_fields import ToolUse
from router.tools import reasoning
from router.tools.grammars import calls_grammar, reasoning_grammar

_BARE = {"type": "object"}
_COMBINATORS = ("type", "$ref", "anyOf", "oneOf", "allOf")


def chat_structure(request: ChatCompletionRequest, model: ServedModel, prompt: Sequence[int]) -> Structure | None:
    """Return what the output for ``prompt`` must be; None: anything. Its grammar is not compiled here.

    Raises InvalidRequestError that names the field.
    """
    wished, use = structure_of(request), request.tool_use
    must_call = use is not None and use.mode != "auto"
    if wished is None and not must_call:
        return None
    if wished is not None and must_call:
        if not wished.field.startswith("response_format"):
            raise InvalidRequestError(f"{wished.field}: not together with tool_choice", param=wished.param)
        wished = None  # the format of a content that there will not be
    think = _reasoning(model, prompt)
    if wished is not None and not think and use is None:
        return wished
    return _composed(wished, use, think, model)


def _reasoning(model: ServedModel, prompt: Sequence[int]) -> list[str]:
    """Return the beginning of the grammar, with reasoning if the output may have some."""
    tail = prompt_tail(model, prompt) if model.reasons else reasoning.END
    if tail.endswith(reasoning.END):
        return []
    is_open = tail.endswith(reasoning.BEGIN)
    start = "start: think output" if is_open else "start: think? output"
    return [start, *reasoning_grammar(model.mark, is_open=is_open)]


def _composed(wished: Structure | None, use: ToolUse | None, think: list[str], model: ServedModel) -> Structure:
    lines, parts, fields = think or ["start: output"], {}, {}
    if use is not None:
        for index, (tool, field) in enumerate(zip(use.tools, use.fields, strict=True)):
            parts[f"t{index}"] = _arguments(tool["function"]["parameters"], field)
            fields[f"t{index}"] = field
        family = output_family(model, use)
        assert family is not None
        lines = [*lines, *calls_grammar(family.name, use.names, model.mark, parallel=use.parallel)]
    if wished is not None:
        parts["wished"] = wished.grammar
        fields["wished"] = wished.field
    output = ["@wished"] * (wished is not None) + ["calls"] * (use is not None)
    lines = [*lines, f"output: {' | '.join(output)}"]
    content = {"lark": "\n".join(lines), "parts": {name: [part.kind, part.text] for name, part in parts.items()}}
    field = wished.field if wished is not None else "tools"
    text = msgspec.json.encode(content).decode()
    if len(text) > MAX_GRAMMAR_BYTES or len(text.encode()) > MAX_GRAMMAR_BYTES:
        reason = f"are longer than {MAX_GRAMMAR_BYTES} bytes, too long to be enforced"
        raise InvalidRequestError(f"tools: {reason}", param="tools")
    return Structure(field, Grammar(GrammarKind.COMPOSED, text), fields)


def _arguments(parameters: dict[str, object], field: str) -> Grammar:
    """Return the grammar of a call's arguments: an object with no properties but those that the schema names."""
    schema = parameters if any(key in parameters for key in _COMBINATORS) else {**_BARE, **parameters}
    return grammar_of(Wish(field, "json", schema, {"disable_additional_properties": True}))
