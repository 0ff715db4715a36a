"""A decode node is killed while it writes responses and messages: their clients read on as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from support.asking import lines
from support.cluster import PATIENCE_S, Cluster

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
PER_KIND = 4
NUM_TOKENS = 800
"""So many that the killed node still writes when the last of the streams has begun, on a busy machine too."""

COMMON: dict[str, Any] = {"model": "demo", "temperature": 0.9, "ignore_eos": True}


def body_of(path: str, number: int) -> dict[str, Any]:
    """Return a request for ``NUM_TOKENS`` tokens, drawn by its seed."""
    if path == RESPONSES:
        return {**COMMON, "input": f"question {number}", "max_output_tokens": NUM_TOKENS, "seed": number}
    return {**COMMON, "messages": [{"role": "user", "content": f"{number}?"}], "max_tokens": NUM_TOKENS, "seed": number}


def text_of(path: str, answer: dict[str, Any]) -> str:
    """Return the text of a whole answer that has nothing else."""
    if path == RESPONSES:
        [item] = answer["output"]
        assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
        return str(item["content"][0]["text"])
    [block] = answer["content"]
    assert answer["stop_reason"] == "max_tokens"
    return str(block["text"])


async def whole(http: httpx.AsyncClient, path: str, number: int) -> str:
    response = await http.post(path, json=body_of(path, number))
    assert response.status_code == 200, response.text
    return text_of(path, response.json())


async def streamed(http: httpx.AsyncClient, path: str, number: int, begun: Callable[[], None]) -> str:
    """Return the text of a stream, which must end well; ``begun`` is called when some of it is there."""
    text, last = "", ""
    async with http.stream("POST", path, json={**body_of(path, number), "stream": True}) as response:
        async for line in lines(response):
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            last = event["type"]
            if last == "response.output_text.delta":
                text += event["delta"]
            elif last == "content_block_delta":
                text += event["delta"]["text"]
            if text:
                begun()
    assert last in ("response.incomplete", "message_stop"), last
    return text


@pytest.mark.fault("F13")
def test_responses_and_messages_go_on_elsewhere_when_their_decode_node_is_killed(fake_cluster: Cluster) -> None:
    kinds = [(path, number) for path in (RESPONSES, MESSAGES) for number in range(PER_KIND)]
    incarnation, retries = fake_cluster.incarnations()["d0"], fake_cluster.status()["requests"]["retries"]
    victim = fake_cluster.pid("d0")

    async def scenario() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=fake_cluster.url, timeout=PATIENCE_S, trust_env=False, limits=limits
        ) as http:
            expected = await asyncio.gather(*(whole(http, *kind) for kind in kinds))
            begun = [asyncio.Event() for _ in kinds]
            streams = [
                asyncio.ensure_future(streamed(http, *kind, event.set))
                for kind, event in zip(kinds, begun, strict=True)
            ]
            answers = [asyncio.ensure_future(whole(http, *kind)) for kind in kinds]
            await asyncio.gather(*(event.wait() for event in begun))
            os.kill(victim, signal.SIGKILL)
            assert await asyncio.gather(*streams) == expected
            assert await asyncio.gather(*answers) == expected

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
    fake_cluster.wait_until_restarted("d0", incarnation)
    assert fake_cluster.status()["requests"]["retries"] > retries
