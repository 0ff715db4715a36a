"""Structured output: the grammar that the fields of a request ask for, as in OpenAI's API and in vLLM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

import msgspec

from kvrelay.errors import InvalidRequestError
from kvrelay.protocol.request import Grammar, GrammarKind
from router.openai.field_types import shown

MAX_GRAMMAR_BYTES = 128 << 10
MAX_CHOICES = 4096

WHITESPACE = r"[ \t]?|\n[ \t]{0,40}"
"""Between the tokens of JSON: what printers of JSON write. A model that may write any amount may never stop."""

_KINDS = ("json", "json_object", "regex", "choice", "grammar")
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}


class Format(Protocol):
    """The field ``response_format``."""

    type: str
    json_schema: dict[str, Any] | None


class StructureFields(Protocol):
    """The fields of a request that may ask for structure."""

    @property
    def response_format(self) -> Format | None:
        """OpenAI's field."""

    structured_outputs: dict[str, Any] | None
    guided_json: object | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    guided_whitespace_pattern: str | None


class Wish(NamedTuple):
    """One field that asks for structure: ``field`` is its path in the request."""

    field: str
    kind: str
    value: Any
    options: Mapping[str, Any]


class Structure(NamedTuple):
    """The grammar that the output must satisfy, and the path of the field that asks for it.

    ``fields``: the paths of the fields that ask for the parts of a composed grammar, by the parts' names.
    """

    field: str
    grammar: Grammar
    fields: dict[str, str] | None = None

    @property
    def param(self) -> str:
        """The name of the field."""
        return self.field.partition(".")[0]


def structure_of(request: StructureFields) -> Structure | None:
    """Return what structured output ``request`` asks for, if any. Its grammar is not compiled here.

    Raises InvalidRequestError that names the field.
    """
    wishes = [*_response_format(request), *_structured_outputs(request), *_guided(request)]
    if not wishes:
        return None
    if len(wishes) > 1:
        _refuse(wishes[1].field, f"not together with {wishes[0].field}")
    [wish] = wishes
    grammar = grammar_of(wish)
    if len(grammar.text) > MAX_GRAMMAR_BYTES or len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
        _refuse(wish.field, f"is longer than {MAX_GRAMMAR_BYTES} bytes")
    return Structure(wish.field, grammar)


def _response_format(request: StructureFields) -> Iterator[Wish]:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return
    if wanted.type == "json_object":
        yield Wish("response_format", "json_object", True, {})
        return
    if wanted.type != "json_schema":
        kinds = "'text', 'json_object' and 'json_schema' are"
        _refuse("response_format", f"type {shown(wanted.type)} is not supported, only {kinds}")
    described = wanted.json_schema or {}
    if described.get("schema") is None:
        _refuse("response_format.json_schema.schema", "is required")
    yield Wish("response_format.json_schema.schema", "json", described["schema"], {})


def _structured_outputs(request: StructureFields) -> Iterator[Wish]:
    given = request.structured_outputs
    if not given:
        return
    set_ = {name: value for name, value in given.items() if value is not None and value is not False}
    unknown = sorted(set_.keys() - {*_KINDS, *_OPTIONS, "disable_fallback"})
    if unknown:
        _refuse("structured_outputs", f"{shown(unknown[0])} is not supported")
    options = {name: set_[name] for name in _OPTIONS if name in set_}
    yield from (Wish(f"structured_outputs.{name}", name, set_[name], options) for name in _KINDS if name in set_)


def _guided(request: StructureFields) -> Iterator[Wish]:
    """Yield the older names of the same."""
    pattern = request.guided_whitespace_pattern
    options = {} if pattern is None else {"whitespace_pattern": pattern}
    for field, kind in _GUIDED.items():
        value = getattr(request, field)
        if value is not None:
            yield Wish(field, kind, value, options)


def grammar_of(wish: Wish) -> Grammar:
    """Return the grammar that a field asks for. Raises InvalidRequestError."""
    match wish.kind:
        case "json":
            return Grammar(GrammarKind.JSON_SCHEMA, _json_schema(wish))
        case "json_object":
            return Grammar(GrammarKind.JSON_SCHEMA, _encoded({"type": "object"}, wish))
        case "choice":
            return Grammar(GrammarKind.CHOICE, _choice(wish))
        case _:
            if not isinstance(wish.value, str) or not wish.value:
                _refuse(wish.field, "should be a text, and not empty")
            return Grammar(GrammarKind(wish.kind), wish.value)


def _json_schema(wish: Wish) -> str:
    schema = wish.value
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError, ValueError) as error:
            _refuse(wish.field, f"is not JSON: {error}")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        _refuse(wish.field, f"should be a JSON schema: an object, not {shown(schema)}")
    return _encoded(schema, wish)


def _encoded(schema: dict[str, Any], wish: Wish) -> str:
    """Return ``schema`` with the whitespace that is allowed between JSON's tokens."""
    pattern = wish.options.get("whitespace_pattern", WHITESPACE)
    if not isinstance(pattern, str):
        _refuse(wish.field, "whitespace_pattern should be a text")
    compact = wish.options.get("disable_any_whitespace")
    whitespace = {"whitespace_flexible": False} if compact else {"whitespace_pattern": pattern}
    try:
        if wish.options.get("disable_additional_properties"):
            schema = _closed(schema)
        return msgspec.json.encode({**schema, "x-guidance": whitespace}).decode()
    except (UnicodeEncodeError, RecursionError) as error:
        _refuse(wish.field, f"cannot be written as JSON: {error}")


def _choice(wish: Wish) -> str:
    texts = wish.value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        _refuse(wish.field, "should be a list of texts, none of them empty")
    if len(texts) > MAX_CHOICES:
        _refuse(wish.field, f"should have at most {MAX_CHOICES} items")
    return msgspec.json.encode(texts).decode()


def _closed(schema: Any) -> Any:
    """Return ``schema`` with no properties allowed but those it names."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not {"additionalProperties", "patternProperties"} & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _refuse(field: str, reason: str) -> NoReturn:
    raise InvalidRequestError(f"{field}: {reason}", param=field.partition(".")[0])
