"""Errors that nobody has foreseen: a 500 in the format of the API, and the reason only in the router's log."""

from __future__ import annotations

from typing import Any

import pytest
from instant_router import InstantRouter

from router.http import admin, generate


@pytest.mark.parametrize(
    ("path", "module", "is_openai"),
    [
        ("/v1/completions", generate, True),
        ("/v1/chat/completions", generate, True),
        ("/v1/responses", generate, True),
        ("/v1/messages", generate, False),
        ("/tokenize", admin, True),
        ("/detokenize", admin, True),
        ("/v1/messages/count_tokens", admin, False),
    ],
)
def test_a_bug_of_ours_is_a_500_that_tells_nothing(
    path: str, module: Any, is_openai: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(*_: object) -> None:
        raise ZeroDivisionError("what a client wrote")

    monkeypatch.setattr(module, "prepared", fails)
    response = InstantRouter().post(path, {})
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["message"] == "internal error, see the router's log"
    assert error.get("code") == ("internal_error" if is_openai else None)
    assert "what a client wrote" not in response.text
    (record,) = [record for record in caplog.records if "error while serving" in record.getMessage()]
    assert record.exc_info is not None
    assert path in record.getMessage()
