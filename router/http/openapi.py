"""``GET /openapi.json``: an OpenAPI document, made once from the routes and from the schemas that read the requests."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import kvrelay
from router.anthropic.schemas import MessagesRequest, PromptFields
from router.http.unsupported import NAME as UNSUPPORTED
from router.openai.dialect import PROMPT_FIELDS
from router.openai.fields import Fields
from router.openai.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from router.responses.schemas import ResponsesFields, ResponsesRequest

PATH = "/openapi.json"

BODIES: Mapping[str, tuple[type[Fields], ...]] = {
    "/v1/completions": (CompletionRequest,),
    "/v1/chat/completions": (ChatCompletionRequest,),
    "/v1/responses": (ResponsesRequest,),
    "/v1/responses/input_tokens": (ResponsesFields,),
    "/v1/messages": (MessagesRequest,),
    "/v1/messages/count_tokens": (PromptFields,),
    "/tokenize": (TokenizeTextRequest, TokenizeChatRequest),
    "/detokenize": (DetokenizeRequest,),
}
"""What reads the bodies that are posted to each path: one of these fits."""

_COUNTED = (ResponsesFields, PromptFields)

Queries = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Parameters of queries: the schema of each, by path and name."""

_STREAMS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})
_NOT_JSON = {"/metrics": "text/plain", "/dashboard": "text/html"}
_MAY_BE_UNAVAILABLE = frozenset({*BODIES, "/ready", "/readyz"})
_SCHEMAS = "#/components/schemas/"

_ERROR_SCHEMAS: Mapping[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string"},
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


def with_document(routes: Sequence[Route], title: str, queries: Queries = MappingProxyType({})) -> list[Route]:
    """Return ``routes`` and that of the document of all of them."""

    async def openapi(_: Request) -> Response:
        """``GET /openapi.json``: this document."""
        return Response(content, media_type="application/json")

    described = [*routes, Route(PATH, openapi)]
    paths: dict[str, dict[str, Any]] = {}
    for route in described:
        if route.name != UNSUPPORTED:
            paths.setdefault(_path(route), {}).update(_operations(route, queries))
    document = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": kvrelay.__version__},
        "security": [{"key": []}, {}],  # where there are keys
        "paths": paths,
        "components": {
            "schemas": _schemas(paths),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    content = msgspec.json.encode(document)
    return described


def _path(route: Route) -> str:
    """Return the path as OpenAPI spells it."""
    return route.path.replace(":path}", "}")


def _operations(route: Route, queries: Queries) -> dict[str, Any]:
    path = _path(route)
    operation: dict[str, Any] = {"responses": _responses(path)}
    if path in BODIES:
        kinds = BODIES[path]
        schemas = [{"$ref": _SCHEMAS + kind.__name__} for kind in kinds]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    else:
        operation["summary"] = _summary(route)
    text = {"type": "string"}
    parameters = [{"name": name, "in": "path", "required": True, "schema": text} for name in route.param_convertors]
    parameters += [{"name": name, "in": "query", "schema": its} for name, its in queries.get(path, {}).items()]
    if parameters:
        operation["parameters"] = parameters
    return {method.lower(): operation for method in route.methods or () if method != "HEAD"}


def _responses(path: str) -> dict[str, Any]:
    """Return the answers. Those to requests that went well are described in ``docs/api.md``."""
    media_types = [_NOT_JSON.get(path, "application/json"), *(["text/event-stream"] if path in _STREAMS else [])]
    error = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    refused = {"content": {"application/json": {"schema": {"$ref": _SCHEMAS + error}}}}
    responses = {
        "2XX": {"description": "success", "content": {media_type: {} for media_type in media_types}},
        "4XX": {"description": "the request is refused", **refused},
    }
    if path in _MAY_BE_UNAVAILABLE:
        responses["503"] = {"description": "not now", **refused}
    return responses


def _summary(route: Route) -> str:
    """Return what the docstring of an endpoint says behind its method and path."""
    first, _, _ = (inspect.getdoc(route.endpoint) or "").partition("\n")
    return first.rpartition("``")[2].lstrip(": ")


def _schemas(paths: Mapping[str, object]) -> dict[str, Any]:
    """Return the schemas of all that is posted to ``paths``, and of errors."""
    kinds = [kind for path in paths for kind in BODIES.get(path, ())]
    if not kinds:
        return dict(_ERROR_SCHEMAS)
    _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_SCHEMAS + "{model}")
    schemas: dict[str, Any] = found["$defs"]
    chat = schemas[ChatCompletionRequest.__name__]["properties"]
    for kind in kinds:
        properties = schemas[kind.__name__]["properties"]
        copied = PROMPT_FIELDS if kind in _COUNTED else kind.copied
        properties.update({name: chat[name] for name in sorted(copied - properties.keys())})
    return {**schemas, **_ERROR_SCHEMAS}
