"""What clients may ask for: every field with its type, bounds and default.

Unknown fields are ignored, as clients send many. Fields we know and cannot honour are refused (``REFUSED_FIELDS``):
an answer that silently lacks what was asked for is worse than none. A ``null`` is as good as an absent field.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from kvrelay.core.errors import InvalidRequestError

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_IDS = 1024
INT64 = (1 << 63) - 1

REFUSED_FIELDS = {
    "tools": "tools are not supported",
    "functions": "functions are not supported",
    "suffix": "suffix is not supported",
    "prompt_logprobs": "prompt_logprobs is not supported",
    "use_beam_search": "beam search is not supported",
    "truncate_prompt_tokens": "truncate_prompt_tokens is not supported",
    "allowed_token_ids": "allowed_token_ids is not supported",
    "bad_words": "bad_words is not supported",
    "structured_outputs": "structured outputs are not supported",
    "guided_json": "structured outputs are not supported",
    "guided_regex": "structured outputs are not supported",
    "guided_choice": "structured outputs are not supported",
    "guided_grammar": "structured outputs are not supported",
    "chat_template": "only the model's own chat template is used",
    "documents": "documents are not supported",
    "audio": "only text is supported",
    "prompt_embeds": "prompt_embeds is not supported",
}
"""Fields that would change the answer in a way this server cannot, unless they are empty or false."""


def wrong(reason: str) -> PydanticCustomError:
    """Return the error for a value that is of the right type and still cannot be."""
    return PydanticCustomError("wrong", "{reason}", {"reason": reason})


def _stops(value: object) -> object:
    """Take one stop string for a list of one; refuse empty ones, which would match everywhere."""
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and any(stop == "" for stop in stops):
        raise wrong("should not be empty")
    return stops


def _biases(value: object) -> object:
    """Turn JSON's string keys into token ids."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): bias for key, bias in value.items()}
    except ValueError:
        raise wrong("should have token ids as keys") from None


TokenId = Annotated[int, Field(ge=0, le=INT64)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[StopString] | None, BeforeValidator(_stops), Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[int, Bias] | None, BeforeValidator(_biases), Field(max_length=MAX_BIASES)]
Flag = bool | None


class Fields(BaseModel):
    """Base of all requests: no silent conversion of types."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Fields):
    """What a stream tells besides text: ``usage`` in a last chunk, or in every chunk."""

    include_usage: Flag = None
    continuous_usage_stats: Flag = None


class ResponseFormat(Fields):
    """Form of the answer."""

    type: str = "text"


class GenerationFields(Fields):
    """What completions and chat completions have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=INT64)
    min_tokens: int | None = Field(None, ge=0, le=INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Biases = None
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stops = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_IDS)
    ignore_eos: Flag = None
    include_stop_str_in_output: Flag = None
    skip_special_tokens: Flag = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    return_token_ids: Flag = None
    response_format: ResponseFormat | None = None
    priority: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options: only allowed when stream is true")
        if self.response_format is not None and self.response_format.type != "text":
            raise wrong(f"response_format: type {self.response_format.type!r} is not supported, only 'text' is")
        return self

    @property
    def num_choices(self) -> int:
        """Answers per prompt."""
        return self.n or 1


def _prompt(value: object) -> object:
    """Check that a prompt is text, token ids, or a list of one of these kinds, and not empty."""
    kinds = "a string, a list of strings, a list of token ids or a list of lists of token ids"
    if not isinstance(value, (str, list)):
        raise wrong(f"should be {kinds}")
    if not value:
        raise wrong("should not be empty")
    if isinstance(value, str) or _are_ids(value) or all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and _are_ids(item) for item in value):
        if any(not item for item in value):
            raise wrong("should not hold an empty list of token ids")
        return value
    raise wrong(f"should be {kinds}")


def _are_ids(items: list[object]) -> bool:
    return all(type(item) is int and 0 <= item <= INT64 for item in items)


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]


class CompletionRequest(GenerationFields):
    """Body of ``/v1/completions``. Absent ``max_tokens`` means 16 (null: as many as the model can)."""

    prompt: Prompt
    max_tokens: int | None = Field(16, ge=1, le=INT64)
    best_of: int | None = None
    echo: Flag = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: Flag = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise wrong(f"best_of: only supported if equal to n ({self.num_choices}), not {self.best_of}")
        if self.echo and self.logprobs is not None:
            raise wrong("logprobs: not supported together with echo (no logprobs of the prompt)")
        return self


def _content(value: object) -> str:
    """Return a message's content as one text: of several parts, each is a line."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise wrong("should be a string or a list of parts")
    return "\n".join(_part_text(part) for part in value)


def _part_text(part: object) -> str:
    match part:
        case {"type": "text", "text": str() as text}:
            return text
        case {"type": str() as kind} if kind != "text":
            raise wrong(f"parts of type {kind[:40]!r} are not supported, only 'text' is")
    raise wrong("parts should be objects with type 'text' and a text")


class ChatMessage(Fields):
    """One message. Further keys (``name``, ``reasoning_content``, ...) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1, max_length=64)
    content: Annotated[str, PlainValidator(_content)] = ""


class ChatFields(Fields):
    """How a chat becomes a prompt."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    add_special_tokens: Flag = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _open_or_new(self) -> ChatFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("continue_final_message: not together with add_generation_prompt")
        return self


class ChatCompletionRequest(GenerationFields, ChatFields):
    """Body of ``/v1/chat/completions``."""

    max_completion_tokens: int | None = Field(None, ge=1, le=INT64)
    logprobs: Flag = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _supported(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs: needs logprobs to be true")
        return self


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
    tokens: list[TokenId] = Field(fail_fast=True)


Request = TypeVar("Request", bound=Fields)
Endpoint = Literal["completions", "chat"]


def parse(kind: type[Request], body: dict[str, Any]) -> Request:
    """Return ``body`` as a ``kind``. Raises InvalidRequestError that names the field, the limit and the value."""
    for name, reason in REFUSED_FIELDS.items():
        if name not in kind.model_fields and body.get(name) not in (None, False, 0, "", [], {}):
            raise InvalidRequestError(reason, param=name)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _first_problem(error, kind) from None


_REPR = reprlib.Repr()
"""Shows a value in a time that does not grow with it."""
_REPR.maxstring = 100


def _first_problem(error: ValidationError, kind: type[Fields]) -> InvalidRequestError:
    """Return the first fault pydantic found, in words for the client."""
    item = error.errors(include_url=False)[0]
    # Names of union members are pydantic's affair: a path is made of the request's own names and positions.
    path = [str(part) for part in item["loc"] if isinstance(part, int) or part.replace("_", "").isalpha()]
    if not path:
        field, _, reason = item["msg"].partition(": ")
        return InvalidRequestError(f"{field}: {reason}", param=field)
    param = path[0]
    if item["type"] == "missing":
        return InvalidRequestError(f"{'.'.join(path)}: is required", param=param)
    reason = item["msg"].replace("Input should", "should", 1)
    shown = _REPR.repr(item["input"])
    shown = "" if item["type"] == "wrong" and len(shown) > 80 else f", not {shown:.80}"
    return InvalidRequestError(f"{'.'.join(path)}: {reason}{shown}", param=param)
