"""Request schemas: every field with its type, bounds and default. ``docs/api.md`` describes them.

Unknown fields are ignored, as clients send many. Fields we know and cannot honour are refused (``REFUSED_FIELDS``):
an answer that silently lacks what was asked for is worse than none. A ``null`` is as good as an absent field.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import ConfigDict, Field, PlainValidator, ValidationError, model_validator

from kvrelay.errors import InvalidRequestError
from router.openai.field_types import (
    AllowedTokenIds,
    BadWordTexts,
    Biases,
    JsonSchema,
    Natural,
    NoFunction,
    NumChoices,
    NumLogprobs,
    OnlyText,
    Penalty,
    Positive,
    Probability,
    Prompt,
    RepetitionPenalty,
    Signed,
    Stops,
    StopTokenIds,
    Temperature,
    TokenIds,
    TopK,
    Verbosity,
    shown,
    wrong,
)
from router.openai.fields import Fields, Flag
from router.openai.reading import reading
from router.openai.tool_fields import ToolChoice, Tools, ToolUse, tool_use
from router.openai.unknown_fields import UnknownFields
from router.openai.wording import first_problem

REFUSED_FIELDS = {
    "tools": "tools are only supported in chats",
    "functions": "functions are not supported, tools are",
    "suffix": "suffix is not supported",
    "use_beam_search": "beam search is not supported",
    "chat_template": "only the model's own chat template is used",
    "documents": "documents are not supported",
    "moderation": "moderation is not supported",
    "web_search_options": "there is no web search",
    "lora_path": "LoRA adapters are not supported",
    "prompt_embeds": "prompt_embeds is not supported",
}
"""Unsupported fields that would change the answer, unless they are null, empty, zero or false."""

IGNORED_FIELDS = frozenset(
    {
        "audio",
        "guided_decoding_backend",
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    }
)
"""Fields that do not affect the answer: ``audio`` is for audio output, which only ``modalities`` can ask for.

They are ignored without a log line.
"""

unknown_fields = UnknownFields()


class StreamOptions(Fields):
    """Options of a stream: ``usage`` in a last chunk, or in every chunk. Nothing is obfuscated."""

    include_usage: Flag = None
    continuous_usage_stats: Flag = None
    include_obfuscation: Flag = None


class ResponseFormat(Fields):
    """Format of the answer. ``json_schema``: an object with ``schema``, and a name and more that change nothing."""

    type: str = "text"
    json_schema: dict[str, Any] | None = None


class GenerationFields(Fields):
    """Common fields of completions and chat completions."""

    model: str | None = None
    max_tokens: Natural | None = None
    min_tokens: Natural | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    allowed_token_ids: AllowedTokenIds | None = None
    bad_words: BadWordTexts | None = None
    seed: Signed | None = None
    n: NumChoices | None = None
    stop: Stops | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: Flag = None
    include_stop_str_in_output: Flag = None
    skip_special_tokens: Flag = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    return_token_ids: Flag = None
    prompt_logprobs: NumLogprobs | None = None
    truncate_prompt_tokens: TopK | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    priority: Signed | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options: only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise wrong("prompt_logprobs: not available when stream is true")
        if self.truncate_prompt_tokens == 0:
            raise wrong("truncate_prompt_tokens: should be 1 or more, or -1 for as many as the model takes, not 0")
        return self

    @property
    def num_choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1


class CompletionRequest(GenerationFields):
    """Body of ``/v1/completions``. ``max_tokens`` 0 generates no tokens; with ``echo`` it returns the prompt.

    With ``echo``, ``logprobs`` are those of the prompt too.
    """

    prompt: Prompt
    max_tokens: Natural = 16
    best_of: Signed | None = None
    echo: Flag = None
    logprobs: NumLogprobs | None = None
    add_special_tokens: Flag = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.best_of and self.best_of != self.num_choices:
            raise wrong(f"best_of: only supported if equal to n ({self.num_choices}), not {self.best_of}")
        if self.echo and self.truncate_prompt_tokens is not None:
            raise wrong("echo: not together with truncate_prompt_tokens")
        return self


def _content(value: object) -> str | list[dict[str, str]]:
    """Return a message's content: text, or a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("should be a string or a list of parts")
    return [{"type": "text", "text": _part_text(part)} for part in value]


def _part_text(part: object) -> str:
    match part:
        case {"type": "text", "text": str() as text}:
            return text
        case {"type": str() as kind} if kind != "text":
            raise wrong(f"parts of type {shown(kind)} are not supported, only 'text' is")
    raise wrong("parts should be objects with type 'text' and a text")


def _tool_calls(value: object) -> list[dict[str, Any]]:
    """Return an assistant's tool calls with arguments as objects, as chat templates expect."""
    if not isinstance(value, list):
        raise wrong("should be a list of calls")
    return [_tool_call(call) for call in value]


def _tool_call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong("should hold objects with a function that has a name")
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(value: object) -> dict[str, Any]:
    """Return a call's arguments, which the API encodes as JSON in a string. Absent: none."""
    try:
        arguments = msgspec.json.decode(value or "null") if isinstance(value, str) else value
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise wrong("arguments should be a JSON object, in a string or as it is") from None
    if arguments is not None and not isinstance(arguments, dict):
        raise wrong("arguments should be a JSON object, in a string or as it is")
    return arguments or {}


class ChatMessage(Fields):
    """One message. Other keys (``name``, ``reasoning_content``, ...) are passed to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1, max_length=64)
    content: Annotated[
        str | list[dict[str, str]] | None,
        PlainValidator(_content, json_schema_input_type=str | list[dict[str, Any]] | None),
    ] = None
    tool_calls: Annotated[
        list[dict[str, Any]] | None, PlainValidator(_tool_calls, json_schema_input_type=list[dict[str, Any]] | None)
    ] = None


class ChatFields(Fields):
    """Fields for rendering a chat."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    tools: Tools | None = None
    reasoning_effort: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    verbosity: Verbosity | None = None
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    add_special_tokens: Flag = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _open_or_new(self) -> ChatFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("continue_final_message: not together with add_generation_prompt")
        return self

    @property
    def rendered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of."""
        return self.tools


class ChatCompletionRequest(GenerationFields, ChatFields):
    """Body of ``/v1/chat/completions``."""

    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: Flag = None
    top_logprobs: NumLogprobs | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Flag = None
    include_reasoning: Flag = None
    function_call: NoFunction | None = None
    modalities: OnlyText | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs: needs logprobs to be true")
        return self

    @functools.cached_property
    def tool_use(self) -> ToolUse | None:
        """What the output may call. Raises InvalidRequestError."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls is not False)

    @property
    def rendered_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools


class TokenizeTextRequest(Fields):
    """Body of ``/tokenize`` for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: Flag = None
    return_token_strs: Flag = None


class TokenizeChatRequest(ChatFields):
    """Body of ``/tokenize`` for a chat."""

    model: str | None = None
    return_token_strs: Flag = None


class DetokenizeRequest(Fields):
    """Body of ``/detokenize``."""

    model: str | None = None
    tokens: TokenIds


Request = TypeVar("Request", bound=Fields)


@functools.cache
def _names(kind: type[Fields]) -> tuple[dict[str, str], frozenset[str]]:
    """Return the fields that are refused for ``kind``, with the reasons, and the names of all that are no surprise."""
    names = kind.model_fields.keys() | kind.copied
    own = {name: f"{name}: {reason}" for name, reason in kind.refused.items()}
    refused = {name: reason for name, reason in {**REFUSED_FIELDS, **own}.items() if name not in names}
    return refused, frozenset(names | refused.keys() | IGNORED_FIELDS | kind.ignored)


def parse(kind: type[Request], body: dict[str, Any]) -> Request:
    """Return ``body`` as a ``kind``. Raises InvalidRequestError that names the field, the limit and the value."""
    refused, known = _names(kind)
    for name in () if refused.keys().isdisjoint(body) else refused:
        if body.get(name) not in (None, False, 0, "", [], {}):
            raise InvalidRequestError(refused[name], param=name)
    with reading("the request cannot be read"):
        try:
            request = kind.model_validate(body)
        except ValidationError as error:
            raise first_problem(error) from None
    if not known.issuperset(body):
        unknown_fields.notice(body.keys() - known)
    return request
