"""Chats of several turns: each turn sends the whole history, so prefixes grow.

All begin with one system prompt of 1,000 tokens. The first message is long (something is pasted in: median 800 tokens),
the others are not (median 300). An answer ends by itself, after 180 tokens on average, of the 1,024 that clients allow.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from support.completions import Completion, complete
from support.p_marks import PMarks, marks_of
from support.running_cluster import RunningCluster

NUM_CHATS, NUM_AT_ONCE = 78, 39
MIN_TURNS, MAX_TURNS = 2, 8
SYSTEM_TOKENS = 1_000
FIRST_MEDIAN, NEXT_MEDIAN, MESSAGE_SIGMA, MESSAGE_MAX = 800, 300, 0.8, 8_000
ANSWER_MEAN, MAX_TOKENS = 180, 1_024
VOCAB_SIZE, EOS = 384, 2
SAMPLE_INTERVAL_S = 1.0


def chats(seed: int = 0) -> list[list[list[int]]]:
    """Return what the users say: for each chat the tokens of each message, the system prompt before the first."""
    rng = random.Random(seed)
    system = tokens(rng, SYSTEM_TOKENS)
    made = []
    for _ in range(NUM_CHATS):
        medians = [FIRST_MEDIAN, *[NEXT_MEDIAN] * (rng.randint(MIN_TURNS, MAX_TURNS) - 1)]
        first, *others = [tokens(rng, message_length(rng, median)) for median in medians]
        made.append([system + first, *others])
    return made


def message_length(rng: random.Random, median: int) -> int:
    return min(MESSAGE_MAX, max(1, round(median * rng.lognormvariate(0.0, MESSAGE_SIGMA))))


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(EOS + 1, VOCAB_SIZE) for _ in range(count)]


@dataclass
class ChatLoad:
    """All chats held once with a cluster whose router is at ``port``, and what was seen of P meanwhile."""

    cluster: RunningCluster
    port: int
    completions: list[Completion] = field(default_factory=list)
    marks: list[PMarks] = field(default_factory=list)
    samples: list[dict[str, int]] = field(default_factory=list)

    async def run(self) -> float:
        """Return the seconds all chats took."""
        start_s = time.monotonic()
        sampler = asyncio.create_task(self._sample())
        waiting = iter(chats())
        async with asyncio.TaskGroup() as reading:

            async def client() -> None:
                for messages in waiting:
                    await self._hold(messages, reading)

            async with asyncio.TaskGroup() as clients:
                for _ in range(NUM_AT_ONCE):
                    clients.create_task(client())
            total_s = time.monotonic() - start_s
        sampler.cancel()
        return total_s

    async def _hold(self, messages: list[list[int]], reading: asyncio.TaskGroup) -> None:
        """Hold one chat from its first message to its last answer."""
        history: list[int] = []
        for message in messages:
            history += message
            completion = await complete(self.port, history, MAX_TOKENS)
            history += completion.token_ids
            self.completions.append(completion)
            reading.create_task(self._read_marks(completion.request_id))

    async def _read_marks(self, request_id: str) -> None:
        self.marks.append(await asyncio.to_thread(marks_of, self.cluster.url, request_id))

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL_S)
            load = (await asyncio.to_thread(self.cluster.loads))["p0"]
            self.samples.append({name: load[name] for name in ("num_sending", "used_blocks")})
