"""Which formats of tool calls and reasoning a model has: from its chat template, or from the config."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from kvrelay.config.sections import ReasoningFormat, ToolFormat
from router.tools.calls import NewId
from router.tools.hermes import HermesParser
from router.tools.llama3 import Llama3Parser
from router.tools.mistral import MistralParser
from router.tools.parts import Parser
from router.tools.pythonic import PythonicParser
from router.tools.reasoning import BEGIN as THINK
from router.tools.reasoning import END as END_OF_THINKING

REASONING_MARKS = (THINK, END_OF_THINKING)

_random = random.Random()


def _call_id() -> str:
    return f"call_{_random.getrandbits(96):024x}"


def _mistral_id() -> str:
    """Return nine letters and digits: Mistral's chat templates accept nothing else."""
    return "".join(_random.choices(string.ascii_letters + string.digits, k=9))


@dataclass(frozen=True, slots=True)
class ToolFamily:
    """One format of tool calls. ``marks``: tokens in it, which its parser must see even if they are special tokens.

    ``signs``: texts that are only in chat templates of models that write this format. ``has_grammar``: it can be
    enforced.
    """

    name: ToolFormat
    parser: Callable[[Collection[str], NewId], Parser]
    marks: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    new_id: NewId = _call_id
    has_grammar: bool = True


_FAMILIES = (
    ToolFamily("hermes", HermesParser, ("<tool_call>", "</tool_call>"), ("<tool_call>",)),
    ToolFamily("mistral", MistralParser, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), ("[TOOL_CALLS]",), _mistral_id),
    ToolFamily(
        "pythonic", PythonicParser, ("<|python_start|>", "<|python_end|>"), ("[func_name1(",), has_grammar=False
    ),
    ToolFamily("llama3", Llama3Parser, ("<|python_tag|>",), ("<|python_tag|>", '"parameters": dictionary of')),
)

FAMILIES: Mapping[str, ToolFamily] = {family.name: family for family in _FAMILIES}


def tool_family(configured: ToolFormat, chat_template: str | None) -> ToolFamily | None:
    """Return the format of tool calls, None: there is none."""
    if configured != "auto":
        return FAMILIES.get(configured)
    signs = ((family, sign) for family in _FAMILIES for sign in family.signs)
    return next((family for family, sign in signs if sign in (chat_template or "")), None)


def has_reasoning(configured: ReasoningFormat, chat_template: str | None) -> bool:
    """Return whether the output may begin with reasoning."""
    return configured == "think" or (configured == "auto" and THINK in (chat_template or ""))
