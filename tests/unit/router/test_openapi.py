"""The OpenAPI documents: every route is in them, and a body has the fields that the parser knows, with their bounds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import msgspec
import pytest
from fake_nodes import config
from instant_router import InstantRouter
from starlette.routing import Route
from test_operators import Service, ask

from kvrelay.errors import InvalidRequestError, PromptTooLongError
from router.http.app import App
from router.http.openapi import BODIES
from router.http.operators import make_operators_app
from router.http.unsupported import NAME
from router.model import load_model
from router.openai.dialect import PROMPT_FIELDS
from router.openai.schemas import unknown_fields
from router.preparation import Job, Preparation, Task

TASKS: dict[str, Task] = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/responses/input_tokens": "responses_tokens",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "messages_tokens",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
}
MESSAGES = [{"role": "user", "content": "hi"}]
REQUIRED: dict[str, Any] = {"prompt": "hi", "messages": MESSAGES, "tokens": [1], "max_tokens": 2}
VALUES = [True, 17.5, -3, -(10**30), 10**30, 2e9, "text", "x" * 2000, [], [[]], [17.5], ["x"] * 2000, {}, {"x": []}]


@cache
def document() -> dict[str, Any]:
    content: dict[str, Any] = InstantRouter().request("GET", "/openapi.json").json()
    return content


def schema_of(kind_name: str) -> dict[str, Any]:
    found: dict[str, Any] = document()["components"]["schemas"][kind_name]
    return found


def routes_of(app: object) -> set[str]:
    assert isinstance(app, App)
    return {
        f"{method.lower()} {route.path.replace(':path}', '}')}"
        for route in app.routes
        if isinstance(route, Route) and route.name != NAME
        for method in route.methods or ()
        if method != "HEAD"
    }


def operations(of_document: dict[str, Any]) -> set[str]:
    return {f"{method} {path}" for path, its in of_document["paths"].items() for method in its}


def test_every_route_is_in_the_document() -> None:
    assert operations(document()) == routes_of(InstantRouter().app)
    posted = {operation.removeprefix("post ") for operation in operations(document()) if operation.startswith("post")}
    assert posted == set(BODIES) == set(TASKS)


def test_every_route_of_operators_is_in_theirs() -> None:
    app = make_operators_app(Service())
    content = ask(app, "GET", "/openapi.json").json()
    assert operations(content) == routes_of(app)
    [limit] = content["paths"]["/cluster/requests"]["get"]["parameters"]
    assert limit["schema"]["maximum"] == 256


def test_each_endpoint_without_a_body_says_what_it_is() -> None:
    for path, its in document()["paths"].items():
        assert path in BODIES or len(its["get"]["summary"]) > 5, path


def test_references_lead_somewhere_and_schemas_are_schemas() -> None:
    for schema in document()["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for reference in references(document()):
        schema_of(reference.removeprefix("#/components/schemas/"))


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


KINDS = [(path, kind) for path, kinds in BODIES.items() for kind in kinds]


@pytest.mark.parametrize(("path", "kind"), KINDS)
def test_a_body_has_the_fields_that_the_parser_knows(path: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown: list[str] = []
    monkeypatch.setattr(unknown_fields, "notice", unknown.extend)
    schema = schema_of(kind.__name__)
    fields = schema["properties"].keys()
    copied = PROMPT_FIELDS if path.endswith("_tokens") else kind.copied
    assert fields == kind.model_fields.keys() | copied
    required = {name: REQUIRED[name] for name in schema.get("required", ())}
    prepare(path, {**dict.fromkeys(fields), **required, "no_such_field": 1})
    assert unknown == ["no_such_field"]


@pytest.mark.parametrize(("path", "kind"), KINDS)
def test_what_the_schema_of_a_field_excludes_is_refused(path: str, kind: Any) -> None:
    schema = schema_of(kind.__name__)
    required = {name: REQUIRED[name] for name in schema.get("required", ())}
    num_refused = 0
    for name, its in schema["properties"].items():
        validator = jsonschema.Draft202012Validator({**its, "components": document()["components"]})
        for value in VALUES:
            if validator.is_valid(value):
                continue
            with pytest.raises((InvalidRequestError, PromptTooLongError)) as caught:
                prepare(path, {**required, name: value})
            assert (caught.value.param or "").partition(".")[0] in (name, *renamed(name)), caught.value.message
            num_refused += 1
    assert num_refused > 5 * len(schema["properties"])


def renamed(name: str) -> tuple[str, ...]:
    """Return what a field of another dialect is called where it is checked; its name is put back in the answer."""
    return {"stop_sequences": ("stop",), "input": ("messages",)}.get(name, ())


@cache
def preparation() -> Preparation:
    return Preparation(load_model(config()))


def prepare(path: str, body: dict[str, Any]) -> None:
    job = Job(
        task=TASKS[path], body=msgspec.json.encode(body), max_body_bytes=1 << 20, max_model_len=512, max_requests=64
    )
    preparation().prepare(job)


def test_what_fits_the_schema_is_served() -> None:
    body = {
        "messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": []}],
        "stop": ["x"],
        "logit_bias": {"7": 3},
        "temperature": 0.5,
        "n": 2.0,
        "modalities": ["text"],
        "verbosity": "medium",
        "tool_choice": "auto",
        "max_completion_tokens": 3,
    }
    components = document()["components"]
    jsonschema.Draft202012Validator({**schema_of("ChatCompletionRequest"), "components": components}).validate(body)
    assert InstantRouter().post("/v1/chat/completions", body).status_code == 200
