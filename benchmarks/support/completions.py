"""A lean client for streamed completions of token ids: one connection per request, little work per token."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import httptools
import msgspec


@dataclass
class Completion:
    """One answer, with the moments (``time.monotonic``) of its request and of each of its parts with tokens.

    ``num_tokens``: tokens of each of these parts.
    """

    sent_s: float
    request_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s


class _Stream(asyncio.Protocol):
    """Reads one response. ``done`` gets its status when it is complete."""

    def __init__(self, completion: Completion) -> None:
        self._completion = completion
        self._parser = httptools.HttpResponseParser(self)
        self.rest = b""
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionResetError("the router closed the connection"))

    def on_body(self, body: bytes) -> None:
        *events, self.rest = (self.rest + body).split(b"\n\n")
        for event in events:
            if event != b"data: [DONE]":
                self._take(msgspec.json.decode(event.removeprefix(b"data: ")))

    def on_message_complete(self) -> None:
        self.done.set_result(self._parser.get_status_code())

    def _take(self, chunk: dict[str, Any]) -> None:
        completion = self._completion
        if "error" in chunk:
            raise RuntimeError(chunk["error"]["message"])
        completion.request_id = chunk["id"]
        for choice in chunk["choices"]:
            if choice["token_ids"]:
                completion.token_ids += choice["token_ids"]
                completion.token_s.append(time.monotonic())
                completion.num_tokens.append(len(choice["token_ids"]))
        if chunk.get("usage"):
            details = chunk["usage"].get("prompt_tokens_details") or {}  # other servers may leave them out
            completion.num_cached_tokens = details.get("cached_tokens", 0)


async def complete(port: int, prompt: list[int], max_tokens: int, **more: object) -> Completion:
    """Return the completion of ``prompt`` by the server at ``port``. Raises RuntimeError if it fails."""
    body = msgspec.json.encode(
        {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **more,
        }
    )
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    completion = Completion(time.monotonic())
    loop = asyncio.get_running_loop()
    transport, stream = await loop.create_connection(lambda: _Stream(completion), "127.0.0.1", port)
    try:
        transport.write(head.encode() + body)
        status = await stream.done
    finally:
        transport.close()
    if status != 200:
        raise RuntimeError(f"the server answered {status}: {stream.rest.decode(errors='replace')[:500]}")
    return completion
