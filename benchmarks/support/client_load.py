"""Sends a load of prompts to a cluster and samples its prefill node."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from support.chats import MAX_TOKENS
from support.completions import Completion, complete
from support.p_marks import PMarks, marks_of
from support.prompt_loads import Client, Load
from support.running_cluster import RunningCluster

SAMPLE_INTERVAL_S = 1.0


@dataclass
class ClientLoad:
    """``load`` sent once to a cluster whose router is at ``port``; its times are stretched by ``time_scale``.

    ``marks`` and ``samples`` are of the node called p0, if ``looks_at_p``.
    """

    cluster: RunningCluster
    port: int
    load: Load
    time_scale: float = 1.0
    looks_at_p: bool = True
    completions: list[Completion] = field(default_factory=list)
    marks: list[PMarks] = field(default_factory=list)
    samples: list[dict[str, int]] = field(default_factory=list)

    async def run(self) -> float:
        """Return the seconds until the last answer was complete."""
        start_s = time.monotonic()
        sampler = asyncio.create_task(self._sample())
        waiting = iter(self.load.clients)
        async with asyncio.TaskGroup() as reading:

            async def serve() -> None:
                for client in waiting:
                    await asyncio.sleep(start_s + client.start_s * self.time_scale - time.monotonic())
                    await self._hold(client, reading)

            async with asyncio.TaskGroup() as clients:
                for _ in range(self.load.num_at_once):
                    clients.create_task(serve())
            total_s = time.monotonic() - start_s
        sampler.cancel()
        return total_s

    async def _hold(self, client: Client, reading: asyncio.TaskGroup) -> None:
        """Send all messages of ``client``, each with the history before it."""
        history: list[int] = []
        fixed = {} if self.load.max_tokens is None else {"ignore_eos": True}
        for message in client.messages:
            history += message
            completion = await complete(self.port, history, self.load.max_tokens or MAX_TOKENS, **fixed)
            history += completion.token_ids
            self.completions.append(completion)
            if self.looks_at_p:
                reading.create_task(self._read_marks(completion.request_id))

    async def _read_marks(self, request_id: str) -> None:
        self.marks.append(await asyncio.to_thread(marks_of, self.cluster.url, request_id))

    async def _sample(self) -> None:
        while self.looks_at_p:
            await asyncio.sleep(SAMPLE_INTERVAL_S)
            load = (await asyncio.to_thread(self.cluster.loads))["p0"]
            self.samples.append({name: load[name] for name in ("num_sending", "used_blocks")})
