"""Endpoints that there are not, and bodies that are no JSON: refused with the reason."""

from __future__ import annotations

from functools import cache

import pytest
from instant_router import InstantRouter

from router.http.unsupported import UNSUPPORTED

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@cache
def router() -> InstantRouter:
    return InstantRouter()


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_an_unsupported_endpoint_says_why(path: str) -> None:
    reason, methods = UNSUPPORTED[path]
    for method in methods:
        asked = path.replace("{rest:path}", "abc" if path.endswith("/{rest:path}") else "/abc")
        response = router().request(method, asked)
        assert response.status_code == 404
        message = f"{method} {asked}: {reason}"
        if path.startswith("/v1/messages"):
            assert response.json()["error"] == {"message": message, "type": "not_found_error"}
            continue
        assert response.json()["error"] == {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": "unsupported_endpoint",
        }


def test_what_there_is_is_not_hidden_by_what_there_is_not() -> None:
    assert router().request("GET", "/v1/models/demo").status_code == 200
    assert router().post(CHAT, {"messages": [{"role": "user", "content": "hi"}]}).status_code == 200
    assert router().request("PUT", CHAT).status_code == 405
    assert router().request("GET", "/v1/nothing").json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", ""]
)
def test_a_body_of_another_type_is_415(path: str, content_type: str) -> None:
    response = router().request("POST", path, content=b"{}", headers={"content-type": content_type})
    assert response.status_code == 415
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_media_type", "Content-Type")
    assert content_type in error["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "application/json"},
        {"content-type": "Application/JSON; charset=UTF-8"},
        {"content-type": "application/vnd.api+json"},
    ],
    ids=["none", "json", "json with a charset", "a kind of json"],
)
def test_a_body_of_json_is_read(headers: dict[str, str]) -> None:
    response = router().request("POST", COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 200
