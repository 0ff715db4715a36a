"""Grammars of outputs that must be calls, in Lark's notation, with the arguments of tool 0 as ``@t0`` and so on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from kvrelay.config.sections import ToolFormat
from router.tools import hermes, mistral, reasoning

MAX_PARALLEL_CALLS = 16
"""Calls of one output that must have some: a model that may go on may never stop."""

_LINE, _COMMA, _SEMICOLON = '"\\n"', '", "', '"; "'
_CALL = 'call: "{\\"name\\": " tool "}"'

Mark = Callable[[str], str]
"""Returns the terminal of a mark: the special token if it is one, else a text."""


def calls_grammar(family: ToolFormat, names: Sequence[str], mark: Mark, *, parallel: bool) -> list[str]:
    """Return the rules of ``calls``: calls of tools with ``names``, in the format of ``family``."""
    num_more = MAX_PARALLEL_CALLS - 1 if parallel else 0
    match family:
        case "hermes":
            call = f'call: {mark(hermes.BEGIN)} "\\n{{\\"name\\": " tool "}}\\n" {mark(hermes.END)}'
            return [f"calls: call{_more(_LINE, num_more)}", call, _tools(names, "arguments")]
        case "mistral" if mark(mistral.ARGUMENTS).startswith("<"):
            begin, arguments = mark(mistral.BEGIN), mark(mistral.ARGUMENTS)
            tools = " | ".join(f"{json.dumps(name)} {arguments} @t{index}" for index, name in enumerate(names))
            return [f"calls: call{{1,{1 + num_more}}}", f"call: {begin} tool", f"tool: {tools}"]
        case "mistral":
            calls = f'calls: {mark(mistral.BEGIN)} " [" call{_more(_COMMA, num_more)} "]"'
            return [calls, _CALL, _tools(names, "arguments")]
        case _:
            return [f"calls: call{_more(_SEMICOLON, num_more)}", _CALL, _tools(names, "parameters")]


def _more(separator: str, num_more: int) -> str:
    """Return the repetition of a call behind the first."""
    return f" ({separator} call){{0,{num_more}}}" if num_more else ""


def _tools(names: Sequence[str], key: str) -> str:
    """Return the rule of ``tool``: a name and its arguments."""
    heads = (json.dumps(f'"{name}", "{key}": ') for name in names)
    return "tool: " + " | ".join(f"{head} @t{index}" for index, head in enumerate(heads))


def reasoning_grammar(mark: Mark, *, is_open: bool) -> list[str]:
    """Return the rules of ``think``: reasoning to its end mark; its begin mark may be in the prompt (``is_open``)."""
    end = mark(reasoning.END)
    begin = "" if is_open else f"{mark(reasoning.BEGIN)} "
    is_token = end.startswith("<")
    thoughts = f"thoughts: /(.|\\n)*/ {end}" if is_token else f"thoughts[suffix={end}]: /(.|\\n)*/"
    return [f'think: {begin}thoughts "\\n"{{0,2}}', thoughts]
