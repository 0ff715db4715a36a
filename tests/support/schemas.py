"""JSON schemas drawn from a seed, and whether a text satisfies one."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema

from kvrelay.protocol.request import Grammar, GrammarKind
from kvrelay.tokenizer.plain import plain_tokens
from kvrelay.tokenizer.token_bytes import TokenBytes

VOCAB_SIZE = 512
END = 191
"""The plain token of a byte that no JSON has."""

_WORDS = ("red", "green", "blue", "a b", 'quo"te', "é", "slash\\", "\n")
_PATTERNS = ("^[a-c]{1,4}$", "^\\d{3}-[A-Z]{2}$", "^(yes|no)(, (yes|no)){0,2}$", "^x[^y]?z$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4")

_token_bytes = TokenBytes(plain_tokens(VOCAB_SIZE))


def text_of(token_ids: list[int]) -> str:
    """Return the text of plain tokens up to ``END``."""
    return b"".join(_token_bytes.of(token) for token in token_ids if token != END).decode("utf-8", "replace")


def is_valid(schema: Any, token_ids: list[int]) -> bool:
    """Return whether an output is one JSON value that satisfies ``schema``, and ends there."""
    try:
        value = json.loads(text_of(token_ids))
    except ValueError:
        return False
    return token_ids[-1] == END and not list(jsonschema.Draft202012Validator(schema).iter_errors(value))


def json_schema(schema: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def drawn_schema(seed: int) -> dict[str, Any]:
    """Return a schema of a value of bounded size: nested, with enums, patterns, references and ranges."""
    rng = random.Random(seed)
    schema = _object(rng, 0, refs=True)
    schema["$defs"] = {
        "leaf": _scalar(rng),
        "tree": {
            "type": "object",
            "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9}, "next": {"$ref": "#/$defs/link"}},
            "required": ["v", "next"],
            "additionalProperties": False,
        },
        "link": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"$ref": "#/$defs/tree"}]},
    }
    return schema


def _value(rng: random.Random, depth: int, refs: bool) -> dict[str, Any]:
    kinds = [_scalar, _scalar]
    if depth < 2:
        kinds += [lambda rng: _object(rng, depth + 1, refs), lambda rng: _array(rng, depth + 1, refs)]
        kinds += [lambda rng: {"anyOf": [_scalar(rng), {"type": "null"}]}]
    if refs:
        kinds += [lambda rng: {"$ref": f"#/$defs/{rng.choice(['leaf', 'tree', 'link'])}"}]
    return rng.choice(kinds)(rng)


def _object(rng: random.Random, depth: int, refs: bool) -> dict[str, Any]:
    names = rng.sample(["id", "name", "size", "a b", "über", 'q"'], rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth, refs) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int, refs: bool) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema = {"type": "array", "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if rng.random() < 0.3:
        return {**schema, "prefixItems": [_scalar(rng)], "items": _scalar(rng)}
    return {**schema, "items": _value(rng, depth, refs)}


def _scalar(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)},
            {"type": "integer", "exclusiveMinimum": low, "maximum": low + 300, "multipleOf": rng.choice([2, 5, 7])},
            {"type": "number", "minimum": low, "exclusiveMaximum": low + 1.5},
            {"type": "string", "maxLength": rng.randint(0, 6)},
            {"type": "string", "pattern": rng.choice(_PATTERNS)},
            {"type": "string", "format": rng.choice(_FORMATS)},
            {"enum": rng.sample([*_WORDS, 3, None, True, 2.5], rng.randint(1, 4))},
            {"const": rng.choice([*_WORDS, 0, {"k": [1, "x"]}])},
            {"type": "boolean"},
            {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
        ]
    )
