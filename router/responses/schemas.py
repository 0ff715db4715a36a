"""The body of ``/v1/responses``, and the chat request that it is."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field, PlainValidator

from router.model import ServedModel
from router.openai.dialect import (
    EXTRA_FIELDS,
    PROMPT_FIELDS,
    Reading,
    chat_request,
    list_at,
    object_at,
    refuse,
    text_at,
)
from router.openai.field_types import Positive, Verbosity, shown, wrong
from router.openai.fields import Fields, Flag
from router.openai.schemas import ChatCompletionRequest, parse
from router.responses.items import chat_messages

LOGPROBS = "message.output_text.logprobs"

_INCLUDABLE = frozenset(
    {
        LOGPROBS,
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""What ``include`` may ask for. All but the logprobs are of things that an answer here does not have."""

_COPIED = EXTRA_FIELDS | {"model", "parallel_tool_calls", "stream", "temperature", "top_p", "top_logprobs", "user"}
_NOT_STORED = "answers are not stored; send the whole conversation as input"


def _truncation(value: object) -> object:
    if value not in ("auto", "disabled"):
        raise wrong("should be 'auto' or 'disabled'")
    return value


def _cache_options(value: object) -> object:
    if not isinstance(value, dict):
        raise wrong("should be an object")
    if value.get("prewarm"):
        raise wrong("prewarm is not supported: a response always has output")
    return value


def _include(value: object) -> object:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise wrong("should be a list of strings")
    for name in value:
        if name not in _INCLUDABLE:
            raise wrong(f"{shown(name)} is not supported")
    return value


def _input(value: object) -> object:
    if not isinstance(value, str | list):
        raise wrong("should be a string or a list of items")
    return value


class TextOptions(Fields):
    """Options of the text: its format as in ``response_format``, but flat."""

    format: dict[str, Any] | None = None
    verbosity: Verbosity | None = None


class ReasoningOptions(Fields):
    """Options of the reasoning. Its text is in the answer; no summaries are made of it."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class StreamOptions(Fields):
    """Options of a stream. Nothing is obfuscated."""

    include_obfuscation: Flag = None


class ResponsesFields(Fields):
    """What makes the prompt: fields of ``/v1/responses`` and of ``/v1/responses/input_tokens``."""

    copied: ClassVar[frozenset[str]] = _COPIED
    # An error names what a field is called here, also if it is about the one of chat completions.
    refused: ClassVar[dict[str, str]] = {
        "background": "answers are not made in the background: use stream",
        "conversation": _NOT_STORED,
        "context_management": "contexts are not compacted",
        "max_completion_tokens": "the field is called max_output_tokens, not max_completion_tokens",
        "max_tokens": "the field is called max_output_tokens",
        "messages": "the field is called input, not messages",
        "personality": "there are no styles to choose from: put it into instructions",
        "previous_response_id": _NOT_STORED,
        "prompt": "prompt templates are not stored; send instructions and input",
        "reasoning_effort": "the field is called reasoning.effort, not reasoning_effort",
        "response_format": "the field is called text.format, not response_format",
    }
    ignored: ClassVar[frozenset[str]] = frozenset({"access_programs", "background_options", "image", "max_tool_calls"})

    input: Annotated[str | list[Any] | None, PlainValidator(_input, json_schema_input_type=str | list[Any] | None)] = (
        None
    )
    instructions: str | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[Any] | None = None
    truncation: (
        Annotated[str, PlainValidator(_truncation, json_schema_input_type=Literal["auto", "disabled"])] | None
    ) = None


class ResponsesRequest(ResponsesFields):
    """Body of ``/v1/responses``."""

    include: Annotated[list[str], PlainValidator(_include, json_schema_input_type=list[str])] | None = None
    max_output_tokens: Positive | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: (
        Annotated[dict[str, Any], PlainValidator(_cache_options, json_schema_input_type=dict[str, Any])] | None
    ) = None
    safety_identifier: str | None = None
    store: bool | None = None
    stream_options: StreamOptions | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def read(body: dict[str, Any], model: ServedModel) -> Reading:
    """Return the chat request that ``body`` is, and the fields of it that the answer repeats.

    Raises InvalidRequestError.
    """
    request = parse(ResponsesRequest, body)
    with_logprobs = LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    chat = chat_request(
        body,
        _COPIED,
        {
            **_chat_fields(request),
            "max_completion_tokens": request.max_output_tokens,
            "logprobs": with_logprobs or None,
            "truncate_prompt_tokens": -1 if request.truncation == "auto" else None,
        },
    )
    return Reading(chat, msgspec.json.encode(_echo(request, body, model)))


def read_prompt(body: dict[str, Any]) -> ChatCompletionRequest:
    """Return the chat request of a body of which only the prompt counts. Raises InvalidRequestError."""
    request = parse(ResponsesFields, body)
    return chat_request(body, PROMPT_FIELDS, _chat_fields(request))


def _chat_fields(request: ResponsesFields) -> dict[str, object]:
    """Return the fields of a chat that make its prompt, and the format of the output."""
    items = [] if request.input is None else request.input
    messages = chat_messages(items)
    if request.instructions is not None:
        messages.insert(0, {"role": "system", "content": request.instructions})
    return {
        "messages": messages or [{"role": "user", "content": ""}],
        "reasoning_effort": request.reasoning.effort if request.reasoning else None,
        "verbosity": request.text.verbosity if request.text else None,
        "response_format": _response_format(request.text.format if request.text else None),
        "tools": [_tool(tool, f"tools.{index}") for index, tool in enumerate(request.tools or ())] or None,
        "tool_choice": _tool_choice(request.tool_choice),
    }


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: item for name, item in given.items() if name != "type"}}


def _tool(value: object, path: str) -> dict[str, Any]:
    """Return a tool as chat completions have it: the function in an object of its own."""
    tool = object_at(value, path)
    kind = text_at(tool.get("type"), f"{path}.type")
    if kind != "function":
        refuse(path, f"type {shown(kind)} is not supported, only 'function' is")
    return {"type": kind, "function": _chosen(tool, ("name", "description", "parameters", "strict"))}


def _tool_choice(value: str | dict[str, Any] | None) -> object:
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind == "function":
        return {"type": "function", "function": _chosen(value, ("name",))}
    if kind != "allowed_tools":
        refuse("tool_choice", f"type {shown(kind)} is not supported, only 'function' and 'allowed_tools' are")
    tools = list_at(value.get("tools"), "tool_choice.tools")
    allowed = [_tool(tool, f"tool_choice.tools.{index}") for index, tool in enumerate(tools)]
    return {"type": "allowed_tools", "allowed_tools": {"mode": value.get("mode"), "tools": allowed}}


def _chosen(value: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value[name] for name in names if value.get(name) is not None}


def _echo(request: ResponsesRequest, body: dict[str, Any], model: ServedModel) -> dict[str, object]:
    """Return the fields of a response that say what the request was."""

    def sampled(name: str) -> object:
        return model.default_sampling.get(name, 1.0) if body.get(name) is None else body[name]

    reasoning, text = request.reasoning or ReasoningOptions(), request.text or TextOptions()
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampled("temperature"),
        "text": {"format": text.format or {"type": "text"}, "verbosity": text.verbosity or "medium"},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": sampled("top_p"),
        "truncation": request.truncation or "disabled",
        "user": body.get("user"),
    }
