"""The fields ``tools`` and ``tool_choice``: checked, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Field, PlainValidator

from kvrelay.errors import InvalidRequestError
from router.openai.field_types import shown, wrong

MAX_TOOLS = 1024
MAX_NAME_CHARS = 128

_NAME = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{MAX_NAME_CHARS}}}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_CHOICES = ("none", "auto", "required")

Mode: TypeAlias = Literal["auto", "required", "named"]


class ToolUse(NamedTuple):
    """What the output may call. ``tools``: those that it may call; ``fields``: the path of each in the request.

    ``parallel``: whether it may hold several calls. ``named``: it is one call of the only tool.
    """

    mode: Mode
    tools: Sequence[dict[str, Any]]
    fields: Sequence[str]
    parallel: bool

    @property
    def names(self) -> list[str]:
        """The names of the tools."""
        return [tool["function"]["name"] for tool in self.tools]


def tool_use(tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None, parallel: bool) -> ToolUse | None:
    """Return how the output may call ``tools``; None: it cannot.

    Raises InvalidRequestError that names ``tools`` or ``tool_choice`` if one of them is wrong.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice: needs tools", param="tool_choice")
        return None
    names = _names(tools)
    if choice == "none":
        return None
    if isinstance(choice, dict):
        mode, allowed = _chosen(choice)
        if unknown := [name for name in allowed if name not in names]:
            raise InvalidRequestError(f"tool_choice: {shown(unknown[0])} is none of tools", param="tool_choice")
        some = [names[name] for name in dict.fromkeys(allowed)]
    else:
        mode, some = ("required" if choice == "required" else "auto"), list(range(len(tools)))
    fields = [f"tools.{index}.function.parameters" for index in some]
    return ToolUse(mode, [tools[index] for index in some], fields, parallel and mode != "named")


def _names(tools: list[dict[str, Any]]) -> dict[str, int]:
    """Return the position of each name."""
    names: dict[str, int] = {}
    for index, tool in enumerate(tools):
        name = tool["function"]["name"]
        if names.setdefault(name, index) != index:
            raise InvalidRequestError(f"tools.{index}.function.name: {shown(name)} is there twice", param="tools")
    return names


def _chosen(choice: dict[str, Any]) -> tuple[Mode, list[str]]:
    """Return the mode and the names of a choice that names tools."""
    if choice["type"] == "function":
        return "named", [choice["function"]["name"]]
    allowed = choice["allowed_tools"]
    return allowed["mode"], [tool["function"]["name"] for tool in allowed["tools"]]


def _tool(value: object) -> dict[str, Any]:
    """Return a tool without nulls. A function without parameters has none."""
    if not isinstance(value, dict) or not isinstance(value.get("type", "function"), str):
        raise wrong("should be an object with type 'function' and a function")
    if value.get("type", "function") != "function":
        raise wrong(f"type {shown(value['type'])} is not supported, only 'function' is")
    if not isinstance(value.get("function"), dict):
        raise wrong("function should be an object")
    function = _without_null(value["function"])
    _check_name(function.get("name"), "function.name")
    if not isinstance(function.setdefault("parameters", _NO_PARAMETERS), dict):
        raise wrong(f"function.parameters should be a JSON schema: an object, not {shown(function['parameters'])}")
    if not isinstance(function.get("description", ""), str):
        raise wrong(f"function.description should be a string, not {shown(function['description'])}")
    if not isinstance(function.get("strict", False), bool):
        raise wrong(f"function.strict should be true or false, not {shown(function['strict'])}")
    return {"type": "function", **_without_null(value), "function": function}


def _tool_choice(value: object) -> object:
    match value:
        case str() if value in _CHOICES:
            return value
        case {"type": "function", "function": {"name": name}}:
            _check_name(name, "function.name")
            return value
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required", "tools": list() as tools}}:
            if not 0 < len(tools) <= MAX_TOOLS:
                raise wrong(f"allowed_tools.tools should have 1 to {MAX_TOOLS} items")
            for tool in tools:
                match tool:
                    case {"type": "function", "function": {"name": name}}:
                        _check_name(name, "allowed_tools.tools: function.name")
                    case _:
                        raise wrong("allowed_tools.tools should hold objects with type 'function' and a function")
            return value
    raise wrong(
        "should be 'none', 'auto', 'required', an object with type 'function' and the function's name, or one with "
        f"type 'allowed_tools', not {shown(value)}"
    )


def _check_name(name: object, field: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong(f"{field} should be 1 to {MAX_NAME_CHARS} letters, digits or any of _ - . : /, not {shown(name)}")


def _without_null(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if item is not None}


Tool = Annotated[dict[str, Any], PlainValidator(_tool, json_schema_input_type=dict[str, Any])]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]
ToolChoice = Annotated[
    str | dict[str, Any],
    PlainValidator(_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | dict[str, Any]),
]
