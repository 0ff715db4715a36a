"""The body of ``/v1/messages``, and the chat request that it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator

from router.anthropic.messages import chat_messages, text_of
from router.openai.dialect import EXTRA_FIELDS, PROMPT_FIELDS, Reading, chat_request, object_at, refuse, text_at
from router.openai.field_types import Positive, Stops, shown, wrong
from router.openai.fields import Fields, Flag
from router.openai.schemas import ChatCompletionRequest, parse

_COPIED = EXTRA_FIELDS | {"max_tokens", "model", "stream", "temperature", "top_p"}
_THINKING = ("adaptive", "between_tools", "disabled", "enabled")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _system(value: object) -> object:
    if not isinstance(value, str | list):
        raise wrong("should be a string or a list of blocks of text")
    return value


class Thinking(Fields):
    """Whether the model reasons. Budgets are not enforced: reasoning counts for ``max_tokens``."""

    type: str
    display: str | None = None


class OutputConfig(Fields):
    """How much effort the model makes, and the format of its text."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class PromptFields(Fields):
    """What makes the prompt: fields of ``/v1/messages`` and of ``/v1/messages/count_tokens``."""

    copied: ClassVar[frozenset[str]] = _COPIED
    # An error names what a field is called here, also if it is about the one of chat completions.
    refused: ClassVar[dict[str, str]] = {
        "compaction": "conversations are not summarized",
        "container": "containers are not supported",
        "context_management": "contexts are not edited or compacted",
        "max_completion_tokens": "the field is called max_tokens",
        "mcp_servers": "MCP servers are not supported: call their tools yourself",
        "output_format": "the field is called output_config.format, not output_format",
        "response_format": "the field is called output_config.format, not response_format",
        "stop": "the field is called stop_sequences, not stop",
        "thread": "conversations are not stored; send all messages",
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "betas",
            "billing_policy",
            "cache_control",
            "diagnostics",
            "fallback_credit_token",
            "fallbacks",
            "inference_geo",
            "speed",
            "user_profile_id",
            "workspace_id",
        }
    )

    messages: Annotated[list[Any], Field(min_length=1)]
    system: Annotated[
        str | list[Any] | None, PlainValidator(_system, json_schema_input_type=str | list[Any] | None)
    ] = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None


class MessagesRequest(PromptFields):
    """Body of ``/v1/messages``."""

    max_tokens: Positive
    stop_sequences: Stops | None = None
    metadata: dict[str, Any] | None = None
    stream: Flag = None


def read(body: dict[str, Any]) -> Reading:
    """Return the chat request that ``body`` is. Raises InvalidRequestError."""
    request = parse(MessagesRequest, body)
    hides = request.thinking is not None and (
        request.thinking.display == "omitted" or request.thinking.type == "disabled"
    )
    fields = {
        **_chat_fields(request),
        "stop": request.stop_sequences,
        "include_reasoning": False if hides else None,
    }
    return Reading(chat_request(body, _COPIED, fields))


def read_prompt(body: dict[str, Any]) -> ChatCompletionRequest:
    """Return the chat request of a body of which only the prompt counts. Raises InvalidRequestError."""
    request = parse(PromptFields, body)
    return chat_request(body, PROMPT_FIELDS, _chat_fields(request))


def _chat_fields(request: PromptFields) -> dict[str, object]:
    """Return the fields of a chat that make its prompt, and the format of the output."""
    messages = chat_messages(request.messages)
    if request.system:
        messages.insert(0, {"role": "system", "content": text_of(request.system, "system")})
    choice = request.tool_choice or {}
    parallel = None if not choice.get("disable_parallel_tool_use") else False
    config = request.output_config or OutputConfig()
    return {
        "messages": messages,
        "reasoning_effort": _effort(request.thinking, config),
        "response_format": _response_format(config.format),
        "tools": [_tool(tool, f"tools.{index}") for index, tool in enumerate(request.tools or ())] or None,
        "tool_choice": _tool_choice(choice) if choice else None,
        "parallel_tool_calls": parallel,
    }


def _effort(thinking: Thinking | None, config: OutputConfig) -> str | None:
    if thinking is None:
        return config.effort
    if thinking.type not in _THINKING:
        refuse("thinking.type", f"should be one of {', '.join(map(repr, _THINKING))}, not {shown(thinking.type)}")
    return "none" if thinking.type == "disabled" else config.effort


def _response_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    if given.get("type") != "json_schema":
        refuse("output_config.format", f"type {shown(given.get('type'))} is not supported, only 'json_schema' is")
    return {"type": "json_schema", "json_schema": {"schema": given.get("schema")}}


def _tool(value: object, path: str) -> dict[str, Any]:
    tool = object_at(value, path)
    kind = tool.get("type", "custom")
    if kind != "custom":
        refuse(path, f"type {shown(kind)} is not supported: only tools with an input_schema are")
    function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    if "input_schema" not in tool:
        refuse(f"{path}.input_schema", "is required")
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _tool_choice(choice: Mapping[str, Any]) -> object:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": text_at(choice.get("name"), "tool_choice.name")}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        refuse("tool_choice.type", f"should be 'auto', 'any', 'tool' or 'none', not {shown(kind)}")
    return _CHOICES[kind]
