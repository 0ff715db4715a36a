"""Types of request fields with bounds. Nothing is converted except whole numbers.

A ``null`` never gets here: it is dropped before the fields are read (``schemas.Fields``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_IDS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_CHARS = 128
INT64 = (1 << 63) - 1

_MAX_KEY_DIGITS = 19
MAX_SHOWN_CHARS = 60


def wrong(reason: str) -> PydanticCustomError:
    """Return the error for an invalid value of the right type."""
    return PydanticCustomError("wrong", "{reason}", {"reason": reason})


def shown(value: object) -> str:
    """Return a short text for ``value`` of a JSON body, in constant time."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        return repr(_cut(value))
    return _cut(repr(value))  # numbers have a few thousand digits at most


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def _whole(value: object) -> object:
    """Convert 16.0 to 16, for clients with only one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_items(value: object) -> object:
    """Convert whole numbers in a list to integers."""
    if isinstance(value, list) and float in set(map(type, value)):
        return [_whole(item) for item in value]
    return value


def _stops(value: object) -> object:
    """Convert one stop string to a list. Refuse empty ones, which would match everywhere."""
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and any(stop == "" for stop in stops[: MAX_STOPS + 1]):
        raise wrong("should not be empty")
    return stops


def _biases(value: object) -> object:
    """Convert JSON's string keys to token ids."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise wrong(f"should have at most {MAX_BIASES} items")
    if not all(_is_token_id(key) for key in value):
        raise wrong("should have token ids as keys")
    return {int(key): bias for key, bias in value.items()}


def _is_token_id(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= _MAX_KEY_DIGITS


def _prompt(value: object) -> object:
    """Check that a prompt is text, token ids, or a list of one of these kinds, and not empty."""
    kinds = "a string, a list of strings, a list of token ids or a list of lists of token ids"
    if not isinstance(value, (str, list)):
        raise wrong(f"should be {kinds}")
    if not value:
        raise wrong("should not be empty")
    if isinstance(value, str) or all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) for item in value):
        prompts = [_whole_items(item) for item in value]
        if not all(prompts):
            raise wrong("should not hold an empty list of token ids")
        if all(_are_ids(prompt) for prompt in prompts):
            return prompts
    elif _are_ids(token_ids := _whole_items(value)):
        return token_ids
    raise wrong(f"should be {kinds}")


def _are_ids(items: object) -> bool:
    return isinstance(items, list) and set(map(type, items)) == {int} and min(items) >= 0 and max(items) <= INT64


def _schema(value: object) -> object:
    """Accept a JSON schema as an object or as text; what it says is checked later."""
    if not isinstance(value, (dict, str)):
        raise wrong("should be a JSON schema, as an object or as a string")
    return value


def _no_function(value: object) -> object:
    """Accept values that need no functions. Others need ``functions``, which are refused."""
    if value not in ("none", "auto"):
        raise wrong("only 'none' and 'auto' are supported, since there are no functions; tool_choice is its successor")
    return value


def _only_text(value: object) -> object:
    if value != ["text"]:
        raise wrong("only ['text'] is supported")
    return value


def _verbosity(value: object) -> object:
    if value not in ("low", "medium", "high"):
        raise wrong("should be 'low', 'medium' or 'high'")
    return value


Whole = BeforeValidator(_whole)
Positive = Annotated[int, Field(ge=1, le=INT64), Whole]
Natural = Annotated[int, Field(ge=0, le=INT64), Whole]
Signed = Annotated[int, Field(ge=-INT64 - 1, le=INT64), Whole]
TopK = Annotated[int, Field(ge=-1, le=INT64), Whole]
NumChoices = Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole]
Probability = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=100)]
TokenId = Annotated[int, Field(ge=0, le=INT64)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True), BeforeValidator(_whole_items)]
StopTokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_IDS), BeforeValidator(_whole_items)]
AllowedTokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1), BeforeValidator(_whole_items)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
BadWordTexts = Annotated[list[BadWord], Field(fail_fast=True, max_length=MAX_BAD_WORDS)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
_StopInput = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_StopsInput = _StopInput | Annotated[list[_StopInput], Field(max_length=MAX_STOPS)]
Stops = Annotated[
    list[StopString],
    Field(fail_fast=True, max_length=MAX_STOPS),
    BeforeValidator(_stops, json_schema_input_type=_StopsInput),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[int, Bias], BeforeValidator(_biases, json_schema_input_type=dict[str, Bias])]
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[Natural] | list[list[Natural]]),
]
NoFunction = Annotated[str, PlainValidator(_no_function, json_schema_input_type=Literal["none", "auto"])]
OnlyText = Annotated[list[str], PlainValidator(_only_text, json_schema_input_type=list[Literal["text"]])]
Verbosity = Annotated[str, PlainValidator(_verbosity, json_schema_input_type=Literal["low", "medium", "high"])]
JsonSchema = Annotated[object, PlainValidator(_schema, json_schema_input_type=dict[str, Any] | str)]
