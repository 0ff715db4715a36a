"""``docs/api.md`` against the code: every endpoint, field, refusal and error code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from instant_router import InstantRouter
from starlette.routing import Route

from kvrelay.errors import KVRelayError
from router.anthropic.schemas import MessagesRequest
from router.http.unsupported import NAME, UNSUPPORTED
from router.openai.fields import Fields
from router.openai.schemas import (
    IGNORED_FIELDS,
    REFUSED_FIELDS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    StreamOptions,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from router.responses.schemas import ResponsesRequest

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
BOTH = set(GenerationFields.model_fields)

NOT_FOR_CLIENTS = {
    "config_error",
    "device_error",
    "protocol_error",
    "registry_unavailable",
    "storage_error",
    "storage_unavailable",
    "checkpoint_error",
    "kernels_unavailable",
}
"""Codes of errors that end a process, or that nodes and routers tell each other."""


@cache
def sections() -> dict[str, list[list[str]]]:
    """Return the table rows below each heading, cell by cell."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
            found[heading] = []
        elif line.startswith("| ") and not line.startswith(("| field", "| method", "| status")):
            found[heading].append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def names(heading: str) -> list[str]:
    return [row[0].strip("` ") for row in sections()[heading]]


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("Fields of completions and chat completions", BOTH),
        ("Only completions", set(CompletionRequest.model_fields) - BOTH),
        ("Only chat completions", set(ChatCompletionRequest.model_fields) - BOTH),
        ("In `stream_options`", set(StreamOptions.model_fields)),
        ("`/tokenize` with a text", set(TokenizeTextRequest.model_fields)),
        ("`/tokenize` with a chat", set(TokenizeChatRequest.model_fields)),
        ("`/detokenize`", set(DetokenizeRequest.model_fields)),
    ],
)
def test_every_field_is_on_the_page_once(heading: str, fields: set[str]) -> None:
    assert sorted(names(heading)) == sorted(fields)
    for row in sections()[heading]:
        assert len(row) == 4, row
        assert re.search(r"honoured|ignored|refused", row[3]), row


@pytest.mark.parametrize(("heading", "kind"), [("Responses", ResponsesRequest), ("Messages", MessagesRequest)])
def test_every_field_of_another_dialect_is_on_the_page(heading: str, kind: type[Fields]) -> None:
    rows = [row for row in sections()[heading] if row[0].startswith("`")]
    fields = {row[0].strip("`"): row for row in rows if len(row) == 4}
    refused = {row[0].strip("`"): row[1] for row in rows if len(row) == 2}
    assert set(fields) == set(kind.model_fields)
    assert refused == kind.refused
    section = PAGE.read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    copied = section.partition("As in chat completions: ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", copied)) == kind.copied - kind.model_fields.keys()
    assert kind.ignored <= set(re.findall(r"`(\w+)`", section.rpartition("|\n\n")[2]))


def test_every_refusal_is_on_the_page_with_its_reason() -> None:
    assert {row[0].strip("` "): row[1] for row in sections()["Refused fields"]} == REFUSED_FIELDS


def test_every_ignored_field_is_on_the_page() -> None:
    _, _, rest = PAGE.read_text("utf-8").partition("## Ignored fields")
    names, _, _ = rest.partition("\n## ")
    assert set(re.findall(r"`(\w+)`", names)) == IGNORED_FIELDS


def test_every_endpoint_is_on_the_page() -> None:
    from router.http.app import App

    app = InstantRouter().app
    assert isinstance(app, App)
    routes = {
        f"{method} {route.path}"
        for route in app.routes
        if isinstance(route, Route) and route.name != NAME
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert routes <= set(names("Endpoints"))
    assert set(names("Endpoints")) <= routes


def test_every_unsupported_endpoint_is_on_the_page_with_its_reason() -> None:
    written = {f"{method} {path}": reason for path, (reason, methods) in UNSUPPORTED.items() for method in methods}
    rows = [row for row in sections()["Unsupported endpoints"] if row[0].startswith("`")]
    assert {name: row[1] for row in rows for name in re.findall(r"`([^`]+)`", row[0])} == written


def test_every_error_code_is_on_the_page_with_its_status() -> None:
    documented = {code: int(row[0]) for row in sections()["Errors"] for code in re.findall(r"`(\w+)`", row[1])}
    kinds = [KVRelayError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    ours = {kind.code: kind.http_status for kind in kinds if kind.__module__ == "kvrelay.errors"}
    assert {code: status for code, status in ours.items() if code not in NOT_FOR_CLIENTS}.items() <= documented.items()
    assert not NOT_FOR_CLIENTS & documented.keys()
