"""Refuses invalid grammars, and says where in a JSON schema it is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from kvrelay.grammar.compiler import GrammarError, check_first_token, compile_grammar, parts_of
from kvrelay.grammar.vocabulary import Vocabulary
from kvrelay.protocol.request import Grammar, GrammarKind

MAX_COMPILE_S = 0.25
"""CPU time. A node compiles while others' steps wait for masks, so what takes longer is refused."""

_MAX_SEARCH_S = 1.0

_MANY = ("properties", "patternProperties", "$defs", "definitions")
_ONE = ("items", "additionalProperties")
_LISTED = ("prefixItems", "anyOf", "oneOf", "allOf")


def check_grammar(grammar: Grammar, vocabulary: Vocabulary) -> None:
    """Raise GrammarError, with the place in a JSON schema, if ``grammar`` is invalid, too complex or unsatisfiable."""
    began_s = time.thread_time()
    try:
        check_first_token(compile_grammar(grammar, vocabulary))
    except GrammarError as error:
        if grammar.kind is GrammarKind.COMPOSED:
            raise _in_part(grammar, vocabulary, error) from None
        if grammar.kind is not GrammarKind.JSON_SCHEMA:
            raise
        raise GrammarError(str(error), _place(json.loads(grammar.text), str(error), vocabulary)) from None
    if time.thread_time() - began_s > MAX_COMPILE_S:
        raise GrammarError(f"takes more than {MAX_COMPILE_S:g} s to compile")


def _in_part(grammar: Grammar, vocabulary: Vocabulary, error: GrammarError) -> GrammarError:
    """Return the error of the first part that is invalid by itself; ``error`` if none is found in time."""
    ends_s = time.thread_time() + _MAX_SEARCH_S
    for name, part in parts_of(grammar).items():
        if time.thread_time() > ends_s:
            break
        try:
            check_grammar(part, vocabulary)
        except GrammarError as found:
            return GrammarError(str(found), found.place, name)
    return error


def _place(root: Any, message: str, vocabulary: Vocabulary) -> str:
    """Return the path of the innermost schema in ``root`` that by itself fails with ``message``."""
    ends_s = time.thread_time() + _MAX_SEARCH_S
    path: list[str] = []
    schema = root
    while True:
        for name, inner in _inside(schema):
            if time.thread_time() > ends_s:
                return ".".join(path)
            if _message(inner, root, vocabulary) == message:
                path.append(name)
                schema = inner
                break
        else:
            return ".".join(path)


def _inside(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly inside ``schema`` with their paths."""
    if not isinstance(schema, dict):
        return
    for key in _MANY:
        if isinstance(several := schema.get(key), dict):
            yield from ((f"{key}.{name}", inner) for name, inner in several.items())
    for key in _LISTED:
        if isinstance(several := schema.get(key), list):
            yield from ((f"{key}.{index}", inner) for index, inner in enumerate(several))
    yield from ((key, schema[key]) for key in _ONE if key in schema)


def _message(schema: Any, root: Any, vocabulary: Vocabulary) -> str | None:
    """Return why ``schema`` alone cannot be compiled, with the definitions of ``root``; None if it can."""
    if isinstance(schema, dict) and isinstance(root, dict):
        schema = {**{key: root[key] for key in ("$defs", "definitions") if key in root}, **schema}
    try:
        check_first_token(
            compile_grammar(Grammar(GrammarKind.JSON_SCHEMA, msgspec.json.encode(schema).decode()), vocabulary)
        )
    except GrammarError as error:
        return str(error)
    return None
