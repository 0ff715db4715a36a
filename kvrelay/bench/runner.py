"""Sends a load to a server and records each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from kvrelay.bench.http import Client
from kvrelay.bench.loads import Conversation, Turn
from kvrelay.bench.prompts import Content
from kvrelay.bench.streams import RequestRecord, stream

COMPLETIONS, CHAT = "completions", "chat"
_PATHS = {COMPLETIONS: "/v1/completions", CHAT: "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of the server. ``fields`` are added to each body; ``api`` is ``completions`` or ``chat``."""

    model: str
    api: str = COMPLETIONS
    fields: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0

    async def ask(
        self, client: Client, prompt: Content | list[dict[str, str]], turn: Turn, texts: list[str] | None = None
    ) -> RequestRecord:
        """Send one request."""
        body = {
            "model": self.model,
            "messages" if self.api == CHAT else "prompt": prompt,
            "max_tokens": turn.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }
        start_s = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s):
                return await stream(client, _PATHS[self.api], body, turn.num_tokens, texts)
        except TimeoutError:
            return RequestRecord(start_s, error=f"no whole answer within {self.timeout_s:g} s")


@dataclass(slots=True)
class Run:
    """A load that was sent: its requests, and the seconds from the first one to the end of the last one."""

    records: list[RequestRecord]
    duration_s: float
    conversations: Sequence[Conversation] = ()


class Runner:
    """Sends conversations at their times, at most ``max_concurrency`` at once.

    As in ``vllm bench serve`` the time that a request waits here for its turn is no part of its latencies.
    """

    def __init__(self, client: Client, target: Target, max_concurrency: int | None = None) -> None:
        self._client = client
        self._target = target
        self._max_concurrency = max_concurrency

    async def run(
        self, conversations: Sequence[Conversation], starts_s: Sequence[float], on_done: Callable[[RequestRecord], None]
    ) -> Run:
        """Send all; ``on_done`` is called with each request that has ended."""
        room = asyncio.Semaphore(self._max_concurrency) if self._max_concurrency else nullcontext()
        records: list[RequestRecord] = []

        async def hold(conversation: Conversation) -> None:
            async with room:
                async for record in self._hold(conversation):
                    records.append(record)
                    on_done(record)

        begin_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for conversation, start_s in zip(conversations, starts_s, strict=True):
                delay_s = begin_s + start_s - time.perf_counter()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                tasks.create_task(hold(conversation))
        return Run(records, time.perf_counter() - begin_s, conversations)

    async def _hold(self, conversation: Conversation) -> AsyncIterator[RequestRecord]:
        """Send the turns of a conversation, each after the answer to the last; stop at one that fails."""
        if self._target.api != CHAT:
            for turn in conversation.turns:
                yield await self._target.ask(self._client, turn.content, turn)
            return
        messages = [{"role": "system", "content": str(conversation.system)}] if conversation.system else []
        for index, turn in enumerate(conversation.turns):
            if index and conversation.pause_s:
                await asyncio.sleep(conversation.pause_s)
            messages.append({"role": "user", "content": str(turn.content)})
            texts: list[str] | None = [] if len(conversation.turns) > 1 else None
            record = await self._target.ask(self._client, messages, turn, texts)
            yield record
            if record.error is not None:
                return
            messages.append({"role": "assistant", "content": "".join(texts or ())})
