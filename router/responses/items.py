"""The input of ``/v1/responses`` as chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from router.openai.dialect import list_at, object_at, refuse, text_at
from router.openai.field_types import shown

Message = dict[str, Any]

_TEXT_PARTS = ("input_text", "output_text", "text")
_NOT_TEXT = ("input_image", "input_file", "input_audio")
_ROLES = ("user", "assistant", "system", "developer")


def chat_messages(items: str | Sequence[Any]) -> list[Message]:
    """Return ``items`` as messages of a chat.

    Reasoning, text and function calls of one turn are one message of the assistant. Raises InvalidRequestError that
    names the item.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Message] = []
    for index, value in enumerate(items):
        path = f"input.{index}"
        item = object_at(value, path)
        kind = item.get("type", "message")
        match kind:
            case "message":
                _add_message(messages, item, path)
            case "function_call":
                _turn(messages, after=()).setdefault("tool_calls", []).append(_call(item, path))
            case "function_call_output":
                messages.append(_output(item, path))
            case "reasoning":
                _add_reasoning(messages, item, path)
            case "item_reference":
                refuse(path, "answers are not stored: send the item itself")
            case _:
                refuse(path, f"type {shown(kind)} is not supported")
    return messages


def _add_message(messages: list[Message], item: dict[str, Any], path: str) -> None:
    role = item.get("role")
    if role not in _ROLES:
        refuse(f"{path}.role", f"should be 'user', 'assistant', 'system' or 'developer', not {shown(role)}")
    content = _content(item.get("content"), f"{path}.content")
    if role == "assistant":
        _turn(messages, after=("content", "tool_calls"))["content"] = content
    else:
        messages.append({"role": role, "content": content})


def _add_reasoning(messages: list[Message], item: dict[str, Any], path: str) -> None:
    """Add the text of reasoning, or of its summary. What is encrypted is not ours, and is left out."""
    text = ""
    for name in ("content", "summary"):
        parts = [
            object_at(part, f"{path}.{name}.{index}")
            for index, part in enumerate(list_at(item.get(name, []), f"{path}.{name}"))
        ]
        text = text or "".join(text_at(part.get("text"), f"{path}.{name}.{n}.text") for n, part in enumerate(parts))
    if text:
        _turn(messages, after=("reasoning_content", "content", "tool_calls"))["reasoning_content"] = text


def _turn(messages: list[Message], after: Sequence[str]) -> Message:
    """Return the assistant's last message if nothing came after it and it has nothing of ``after``, else a new one."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != "assistant" or any(name in last for name in after):
        last = {"role": "assistant"}
        messages.append(last)
    return last


def _call(item: dict[str, Any], path: str) -> dict[str, Any]:
    name, arguments, call_id = (text_at(item.get(key), f"{path}.{key}") for key in ("name", "arguments", "call_id"))
    function = {"name": name, "arguments": _json_object(arguments, f"{path}.arguments")}
    return {"id": call_id, "type": "function", "function": function}


def _json_object(text: str, path: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        refuse(path, "should be a JSON object in a string")
    return value


def _output(item: dict[str, Any], path: str) -> Message:
    call_id = text_at(item.get("call_id"), f"{path}.call_id")
    return {"role": "tool", "tool_call_id": call_id, "content": _content(item.get("output"), f"{path}.output")}


def _content(value: object, path: str) -> str | list[dict[str, str]]:
    """Return text, or text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(path, "should be a string or a list of parts")
    return [{"type": "text", "text": _part_text(part, f"{path}.{index}")} for index, part in enumerate(value)]


def _part_text(value: object, path: str) -> str:
    part = object_at(value, path)
    kind = part.get("type")
    if kind == "refusal":
        return text_at(part.get("refusal"), f"{path}.refusal")
    if kind in _NOT_TEXT:
        refuse(path, f"type {shown(kind)} is not supported: only text is")
    if kind not in _TEXT_PARTS:
        refuse(path, f"type {shown(kind)} is not supported, only 'input_text', 'output_text' and 'refusal' are")
    return text_at(part.get("text"), f"{path}.text")
