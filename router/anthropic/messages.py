"""The messages of ``/v1/messages`` as chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from router.openai.dialect import object_at, refuse, text_at
from router.openai.field_types import shown

Message = dict[str, Any]

_ROLES = ("user", "assistant", "system")


def chat_messages(values: Sequence[object]) -> list[Message]:
    """Return messages with blocks as messages of a chat. Each result of a tool is a message of its own.

    Raises InvalidRequestError that names the message or the block.
    """
    messages: list[Message] = []
    for index, value in enumerate(values):
        path = f"messages.{index}"
        message = object_at(value, path)
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            refuse(f"{path}.role", f"should be 'user', 'assistant' or 'system', not {shown(role)}")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif not isinstance(content, list):
            refuse(f"{path}.content", "should be a string or a list of blocks")
        elif role == "assistant":
            messages.append(_assistant(content, f"{path}.content"))
        else:
            messages += _user(role, content, f"{path}.content")
    return messages


def text_of(value: object, path: str) -> str | list[dict[str, str]]:
    """Return text, or blocks of text as parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(path, "should be a string or a list of blocks of text")
    parts = []
    for index, item in enumerate(value):
        block = object_at(item, f"{path}.{index}")
        if block.get("type") != "text":
            _refuse_type(block, f"{path}.{index}")
        parts.append(_text_part(block, f"{path}.{index}"))
    return parts


def _user(role: str, blocks: Sequence[object], path: str) -> list[Message]:
    """Return the results of tools, and the text between and after them, in their order."""
    messages: list[Message] = []
    for index, value in enumerate(blocks):
        place = f"{path}.{index}"
        block = object_at(value, place)
        match block.get("type"):
            case "text":
                if not messages or messages[-1]["role"] != role:
                    messages.append({"role": role, "content": []})
                messages[-1]["content"].append(_text_part(block, place))
            case "tool_result":
                call_id = text_at(block.get("tool_use_id"), f"{place}.tool_use_id")
                content = text_of(block.get("content", ""), f"{place}.content")
                messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
            case _:
                _refuse_type(block, place)
    return messages or [{"role": role, "content": ""}]


def _assistant(blocks: Sequence[object], path: str) -> Message:
    """Return thinking, text and calls as one message. What is redacted cannot be read, and is left out."""
    message: Message = {"role": "assistant"}
    for index, value in enumerate(blocks):
        place = f"{path}.{index}"
        block = object_at(value, place)
        match block.get("type"):
            case "text":
                message.setdefault("content", []).append(_text_part(block, place))
            case "thinking":
                thinking = text_at(block.get("thinking"), f"{place}.thinking")
                message["reasoning_content"] = message.get("reasoning_content", "") + thinking
            case "redacted_thinking":
                pass
            case "tool_use":
                message.setdefault("tool_calls", []).append(_call(block, place))
            case _:
                _refuse_type(block, place)
    if "content" not in message and "tool_calls" not in message:
        message["content"] = ""
    return message


def _call(block: dict[str, Any], path: str) -> dict[str, Any]:
    name, call_id = text_at(block.get("name"), f"{path}.name"), text_at(block.get("id"), f"{path}.id")
    arguments = block.get("input", {})
    if not isinstance(arguments, dict):
        refuse(f"{path}.input", "should be an object")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _text_part(block: dict[str, Any], path: str) -> dict[str, str]:
    return {"type": "text", "text": text_at(block.get("text"), f"{path}.text")}


def _refuse_type(block: dict[str, Any], path: str) -> NoReturn:
    refuse(path, f"type {shown(block.get('type'))} is not supported: only text, tool_use, tool_result and thinking are")
