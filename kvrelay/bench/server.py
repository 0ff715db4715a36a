"""What the benchmark asks a server besides requests: its model, its tokenizer, and a kvrelay router's timelines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from kvrelay.bench.errors import BenchError
from kvrelay.bench.http import Client
from kvrelay.bench.loads import Turn
from kvrelay.bench.metrics import Metrics, statistics_ms
from kvrelay.bench.prompts import words
from kvrelay.bench.runner import Target
from kvrelay.bench.streams import RequestRecord
from kvrelay.protocol.phases import hidden_share, phases

MAX_TIMELINES = 200
"""A router keeps 256 timelines of ended requests."""

_SETTLE_S = 1.0
"""Nodes report their part of a timeline when the request's blocks are free, which may be after its end."""

_NUM_WORDS = 200


async def model_card(client: Client, name: str | None) -> dict[str, Any]:
    """Return the item of ``/v1/models`` that is called ``name``, or the first.

    Raises BenchError if the server does not answer, refuses or has no such model.
    """
    try:
        answer, body = await client.read("GET", "/v1/models")
    except OSError as error:
        raise BenchError(f"no answer from {client.url}: {error}") from error
    cards = _object(body).get("data")
    if answer.status != 200 or not isinstance(cards, list) or not cards:
        raise BenchError(
            f"{client.url}/v1/models: status {answer.status}, no list of models; is this the API's base URL?"
        )
    for card in cards:
        if isinstance(card, dict) and name in (None, card.get("id")):
            return card
    served = ", ".join(str(card.get("id")) for card in cards if isinstance(card, dict))
    raise BenchError(f"--model {name}: {client.url} serves {served}")


def local_tokenizer(card: dict[str, Any]) -> Path | None:
    """Return the directory of the model's tokenizer if the server's card names one that is on this machine."""
    root = card.get("root")
    path = Path(root) if isinstance(root, str) else None
    return path if path is not None and (path / "tokenizer.json").is_file() else None


async def tokens_per_word(client: Client, target: Target) -> float:
    """Return how many tokens the server makes of an invented word, by a request with one output token."""
    record = await first_request(client, target, Turn(words("measure", _NUM_WORDS), _NUM_WORDS, 1))
    if not record.has_usage:
        raise BenchError("the server reports no usage, so that lengths are unknown: give --tokenizer DIR")
    return max(0.25, record.prompt_tokens / _NUM_WORDS)


async def first_request(client: Client, target: Target, turn: Turn) -> RequestRecord:
    """Send one request before the run. Raises BenchError with the server's words if it fails."""
    prompt: Any = turn.content
    if target.api == "chat":
        prompt = [{"role": "user", "content": str(turn.content)}]
    record = await target.ask(client, prompt, turn)
    if record.error is not None:
        raise BenchError(f"{client.url} did not serve the first request: {record.error}")
    return record


async def is_kvrelay(client: Client) -> bool:
    """Return whether the server is a kvrelay router that shows its timelines."""
    try:
        answer, body = await client.read("GET", "/cluster")
    except OSError:
        return False
    return answer.status == 200 and "nodes" in _object(body)


async def phase_metrics(client: Client, records: Sequence[RequestRecord]) -> Metrics:
    """Return statistics of the phases of the last requests, in milliseconds, from the router's timelines.

    ``hidden_share`` is the mean share of the KV transfers that took place while the prompt was still being computed.
    """
    await asyncio.sleep(_SETTLE_S)
    durations: dict[str, list[float]] = {}
    hidden: list[float] = []
    asked = [record.answer_id for record in records if record.error is None and record.answer_id][-MAX_TIMELINES:]
    for answer_id in asked:
        answer, body = await client.read("GET", f"/cluster/requests/{quote(answer_id)}")
        timeline = _object(body)
        if answer.status != 200 or "marks" not in timeline:
            continue
        for phase in phases(timeline):
            durations.setdefault(phase.name, []).append(max(0.0, phase.duration_s))
        if (share := hidden_share(timeline)) is not None:
            hidden.append(share)
    found: Metrics = {"num_timelines": len(durations.get("request", ()))}
    for name, values in durations.items():
        found |= statistics_ms(name, values)
    if hidden:
        found["hidden_share"] = sum(hidden) / len(hidden)
    return found


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # ValueError: text that is not UTF-8
        return {}
    return found if isinstance(found, dict) else {}
