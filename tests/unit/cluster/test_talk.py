"""``kvrelay chat`` at a terminal: turns are kept, and one that fails costs itself alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from kvrelay.cluster import talk
from kvrelay.cluster.cli import main
from kvrelay.cluster.client import ClusterClient, ClusterUnreachableError
from kvrelay.errors import KVRelayError

Messages = list[dict[str, str]]


class MadeUpCluster(ClusterClient):
    """Answers with the number of messages it was given; fails at the words "fail" and "gone"."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        super().__init__(url, key=key)
        self.asked: list[Messages] = []

    def chat(self, messages: Messages, *, max_tokens: int) -> Iterator[tuple[str, str]]:
        self.asked.append(messages)
        if messages[-1]["content"] == "fail":
            raise KVRelayError("too long")
        if messages[-1]["content"] == "gone":
            raise ClusterUnreachableError("nothing answers")
        yield "id", f"answer to {len(messages)}"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is typed; at its end Ctrl-D."""
    typed: list[str] = []

    def read(_: str) -> str:
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(talk, "ClusterClient", MadeUpCluster)
    return typed


def test_a_conversation_goes_on_after_a_question_that_fails(
    terminal: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal += ["one", "fail", "two"]

    talk.converse("http://router", 8)

    out, err = capsys.readouterr()
    assert out.splitlines() == ["answer to 1", "answer to 3", ""]
    assert err == "error: too long\n"


def test_a_conversation_ends_when_the_cluster_is_gone(terminal: list[str]) -> None:
    terminal += ["one", "gone", "two"]

    with pytest.raises(ClusterUnreachableError):
        talk.converse("http://router", 8)
    assert terminal == ["two"]


@pytest.mark.parametrize("key", ["sk-alice-0123456789", None])
def test_chat_sends_the_api_key_of_the_environment(
    key: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[str, str | None]] = []

    class Cluster(MadeUpCluster):
        def __init__(self, url: str, *, key: str | None = None) -> None:
            super().__init__(url, key=key)
            made.append((url, key))

    monkeypatch.setattr(talk, "ClusterClient", Cluster)
    monkeypatch.delenv("KVRELAY_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("KVRELAY_API_KEY", key)
    monkeypatch.setattr(sys, "argv", ["kvrelay", "chat", "http://router:1", "hello"])

    with pytest.raises(SystemExit) as ended:
        main()

    assert not ended.value.code
    assert capsys.readouterr().out == "answer to 1\n"
    assert made == [("http://router:1", key)]
