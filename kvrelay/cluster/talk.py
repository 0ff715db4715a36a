"""``kvrelay status`` and ``kvrelay chat``."""

from __future__ import annotations

import sys
import time

from rich.console import RenderableType
from rich.live import Live

from kvrelay.cluster.client import ClusterClient, ClusterUnreachableError
from kvrelay.cluster.tables import status_tables
from kvrelay.cluster.terminal import PlainConsole
from kvrelay.errors import KVRelayError
from kvrelay.printable import printable

_WATCH_INTERVAL_S = 1.0


def show_status(url: str, key: str | None, *, watch: bool) -> None:
    """Print the cluster's status once, or refresh it until Ctrl-C."""
    console = PlainConsole()
    with ClusterClient(url, key=key) as cluster:
        if watch:
            _watch(cluster, console)
        else:
            console.print(status_tables(cluster.status()))
            if (reason := cluster.not_ready_because()) is not None:
                console.print(f"not ready: {reason}", style="yellow")


def _watch(cluster: ClusterClient, console: PlainConsole) -> None:
    def picture() -> RenderableType:
        return status_tables(cluster.status())

    try:
        with Live(picture(), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(_WATCH_INTERVAL_S)
                live.update(picture(), refresh=True)
    except KeyboardInterrupt:
        return


def say(url: str, text: str, max_tokens: int, *, key: str | None = None) -> None:
    """Stream the model's answer to ``text`` to the terminal. ``key``: the API key, if the router has keys."""
    with ClusterClient(url, key=key) as cluster:
        _answer(cluster, [{"role": "user", "content": text}], max_tokens)


def converse(url: str, max_tokens: int, *, key: str | None = None) -> None:
    """Run a conversation at the terminal until end of input or Ctrl-C. ``key``: as for ``say``."""
    history: list[dict[str, str]] = []
    with ClusterClient(url, key=key) as cluster:
        while True:
            try:
                text = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            question = {"role": "user", "content": text}
            try:
                answer = _answer(cluster, [*history, question], max_tokens)
            except ClusterUnreachableError:
                raise
            except KVRelayError as error:  # this question cannot be answered; another may be
                print(f"error: {printable(str(error))}", file=sys.stderr)
            else:
                history += [question, {"role": "assistant", "content": answer}]


def _answer(cluster: ClusterClient, messages: list[dict[str, str]], max_tokens: int) -> str:
    parts: list[str] = []
    for _, text in cluster.chat(messages, max_tokens=max_tokens):
        parts.append(text)
        sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
        sys.stdout.flush()
    print()
    return "".join(parts)
