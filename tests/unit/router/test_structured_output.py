"""Fields that ask for structured output become grammars, or errors that say where they are wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from instant_router import InstantRouter

from kvrelay.protocol.request import Grammar, GrammarKind
from router.known_grammars import KnownGrammars
from router.openai.structured import MAX_GRAMMAR_BYTES, WHITESPACE

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"size": {"type": "integer"}, "none": {"const": None}}}
END = 3


def asked(path: str = COMPLETIONS, **fields: Any) -> Grammar | None:
    """Return the grammar of the request that is submitted for ``fields``."""
    router = InstantRouter()
    content: dict[str, Any] = {"prompt": "a"} if path == COMPLETIONS else {"messages": HI}
    router.answer(path, {**content, "stop_token_ids": [END], **fields})
    return router.last.sampling.grammar


def schema_of(grammar: Grammar | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema and its options."""
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    schema = json.loads(grammar.text)
    return schema, schema.pop("x-guidance")


def refused(**fields: Any) -> tuple[str, str]:
    """Return the field and the message of the 400."""
    response = InstantRouter().post(COMPLETIONS, {"prompt": "a", "stop_token_ids": [END], **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "invalid_request_error"
    return error["param"], error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_each_way_to_ask_for_a_schema(path: str, fields: dict[str, Any]) -> None:
    schema, options = schema_of(asked(path, **fields))
    assert schema == SCHEMA
    assert list(schema["properties"]) == ["size", "none"]
    assert options == {"whitespace_pattern": WHITESPACE}


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_any_json_object(fields: dict[str, Any]) -> None:
    assert schema_of(asked(**fields))[0] == {"type": "object"}


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [("regex", "[ab]+", "[ab]+"), ("choice", ["a", "é"], '["a","é"]'), ("grammar", 'start: "a"', 'start: "a"')],
)
def test_other_kinds(kind: str, value: Any, text: str) -> None:
    expected = Grammar(GrammarKind(kind), text)
    assert asked(structured_outputs={kind: value}) == expected
    assert asked(**{f"guided_{kind}": value}) == expected


def test_options_of_json() -> None:
    assert schema_of(asked(structured_outputs={"json": SCHEMA, "disable_any_whitespace": True}))[1] == {
        "whitespace_flexible": False
    }
    assert schema_of(asked(guided_json=SCHEMA, guided_whitespace_pattern="[ ]?"))[1] == {"whitespace_pattern": "[ ]?"}
    nested = {"type": "array", "items": {"properties": {"a": {"properties": {"b": {}}, "additionalProperties": True}}}}
    schema, _ = schema_of(asked(structured_outputs={"json": nested, "disable_additional_properties": True}))
    assert schema["items"]["additionalProperties"] is False
    assert schema["items"]["properties"]["a"]["additionalProperties"] is True


DEEP = '{"items":' * 700 + "{}" + "}" * 700


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"structured_outputs": {"json": None}}],
)
def test_no_structure(fields: dict[str, Any]) -> None:
    assert asked(**fields) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format: type 'xml' is not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema: is required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": 1}},
            "response_format.json_schema: should be an obj",
        ),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json: should be a JSON schema: an object, not 3"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json: is not JSON"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs: 'structural_tag' is not supported"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex: not together with structured"),
        (
            {"guided_json": {}, "response_format": {"type": "json_object"}},
            "guided_json: not together with response_for",
        ),
        ({"guided_choice": []}, "guided_choice: should be a list of texts"),
        ({"guided_choice": ["a", ""]}, "guided_choice: should be a list of texts, none of them empty"),
        ({"guided_choice": ["a"] * 5000}, "guided_choice: should have at most 4096 items"),
        ({"guided_regex": ""}, "guided_regex: should be a text, and not empty"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": 1}}, "structured_outputs.json: whitespace_pattern"),
        ({"guided_json": {"x": "y" * MAX_GRAMMAR_BYTES}}, f"guided_json: is longer than {MAX_GRAMMAR_BYTES} bytes"),
        (
            {"structured_outputs": {"json": DEEP, "disable_additional_properties": True}},
            "structured_outputs.json: cannot be written as JSON",
        ),
        ({"guided_json": {}, "ignore_eos": True}, "ignore_eos: not together with guided_json"),
        ({"guided_json": {}, "min_tokens": 2}, "min_tokens: not together with guided_json"),
        ({"guided_json": {}, "stop_token_ids": None}, "guided_json: the model has no token that ends a text"),
    ],
)
def test_fields_that_cannot_be_honoured(fields: dict[str, Any], message: str) -> None:
    param, found = refused(**fields)
    assert found.startswith(message)
    assert param == message.partition(":")[0].partition(".")[0]


def nested(inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "array", "items": {"anyOf": [{"type": "null"}, inner]}}}}


PLACE = "response_format.json_schema.schema.properties.a.items.anyOf.1"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (nested({"type": "strng"}), f"{PLACE}: Invalid type: strng"),
        (nested({"pattern": "(", "type": "string"}), f"{PLACE}: regex parse error"),
        (nested({"type": "object", "dependentRequired": {}}), f"{PLACE}: Unimplemented keys"),
        (nested({"$ref": "#/$defs/b"}), f"{PLACE}: Pointer '/$defs/b' does not exist"),
        (
            {"$defs": {"b": {"minimum": 3, "maximum": 1, "type": "integer"}}, "$ref": "#/$defs/b"},
            "response_format.json_schema.schema: Unsatisfiable schema: minimum (3) is greater than maximum (1) while "
            "processing json-schema:///#/$defs/b",
        ),
        ({"type": "string", "format": "poem"}, "response_format.json_schema.schema: Unknown format: poem"),
        ({"enum": []}, "response_format.json_schema.schema: Unsatisfiable"),
        (
            nested({"type": "integer", "multipleOf": 99991}),
            "response_format.json_schema.schema: takes more than 0.25 s",
        ),
    ],
)
def test_an_invalid_schema_is_refused_with_its_place(schema: dict[str, Any], message: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    param, found = refused(response_format=wanted)
    assert found.startswith(message)
    assert param == "response_format"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_regex": "a("}, "guided_regex: "),
        ({"guided_regex": "(?=a)b"}, "guided_regex: "),
        ({"guided_grammar": "start: b"}, 'guided_grammar: at 1(8): unknown name: "b"'),
        ({"guided_grammar": 'root ::= "a'}, "guided_grammar: "),
        ({"guided_grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "guided_grammar: "),
        ({"guided_regex": "(" * 5000 + "a" + ")" * 5000}, "guided_regex: "),
        ({"structured_outputs": {"grammar": "start: <|no_such_token|>"}}, "structured_outputs.grammar: "),
    ],
)
def test_other_invalid_grammars(fields: dict[str, Any], message: str) -> None:
    param, found = refused(**fields)
    assert found.startswith(message)
    assert len(found) < 1000
    assert param == message.partition(":")[0].partition(".")[0]


def test_a_known_grammar_needs_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request here has a new pool of workers, but one router knows what it has seen."""
    router = InstantRouter()
    body = {"prompt": "a", "stop_token_ids": [END], "guided_json": SCHEMA}
    known = KnownGrammars()
    for expected in (1, 1):
        monkeypatch.setattr("router.preparation.KnownGrammars", lambda: known)
        router.answer(COMPLETIONS, body)
        assert len(known) == expected
    monkeypatch.setattr("router.preparation_pool.PreparationPool.run", None)
    router.answer(COMPLETIONS, body)
    assert router.last.sampling.grammar is not None


def test_the_grammar_used_longest_ago_is_forgotten() -> None:
    known = KnownGrammars(most=2)
    first, second, third = (Grammar(GrammarKind.REGEX, text) for text in "abc")
    known.add(first)
    known.add(second)
    assert known.has(first)
    known.add(third)
    assert known.has(first)
    assert known.has(third)
    assert not known.has(second)
    assert not known.has(Grammar(GrammarKind.GRAMMAR, "a"))
