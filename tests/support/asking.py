"""Requests to a cluster over HTTP, many at once, and what a fake engine must answer to each."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import httpx
import uvloop

from kvrelay.config.cluster_config import FakeEngineConfig
from kvrelay.engine.fake import reference_tokens
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import RequestSpec, SamplingParams
from support.cluster import PATIENCE_S, Cluster
from support.cluster_config import EOS_TOKEN_ID, VOCAB_SIZE

T = TypeVar("T")

Ends = tuple[int, str]
"""How a request that failed ended: HTTP status and the error's code."""

CONNECTION_LOST: Ends = (0, "connection lost")
"""The end of a request whose router is gone."""

NO_NODE: Ends = (503, "no_node_available")
"""The end of a request that nobody could take."""


@dataclass(frozen=True)
class Ask:
    """One completion of token ids. Greedy unless it has a temperature."""

    prompt: list[int]
    max_tokens: int = 16
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = True
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {
            "model": "demo",
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "return_token_ids": True,
            **self.more,
        }

    def expected(self, fake: FakeEngineConfig) -> list[int]:
        """Return the tokens any right cluster with such engines answers with."""
        sampling = SamplingParams(
            max_tokens=self.max_tokens,
            seed=self.seed,
            temperature=self.temperature,
            eos_token_ids=[EOS_TOKEN_ID],
            ignore_eos=self.ignore_eos,
        )
        spec = RequestSpec(request_id=RequestId("r"), epoch=0, prompt_token_ids=self.prompt, sampling=sampling)
        return reference_tokens(spec, fake)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Return ``length`` token ids."""
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def random_asks(
    seed: int, count: int, *, longest: int = 200, max_tokens: int = 32, shared: Sequence[int] = ()
) -> list[Ask]:
    """Return requests of all lengths, every other one sampled; some prompts begin with all of ``shared``."""
    rng = random.Random(seed)
    asks = []
    for number in range(count):
        begin = list(shared) if rng.random() < 0.3 else []
        prompt = begin + random_prompt(rng, rng.randint(1, longest))
        temperature = 0.9 if number % 2 else 0.0
        asks.append(Ask(prompt, rng.randint(1, max_tokens), temperature, number, ignore_eos=rng.random() < 0.5))
    return asks


@dataclass(frozen=True)
class Answer:
    """What came back at last."""

    status: int
    body: dict[str, Any]
    headers: httpx.Headers

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the only choice."""
        assert self.status == 200, self.body
        (choice,) = self.body["choices"]
        token_ids: list[int] = choice["token_ids"]
        return token_ids

    @property
    def end(self) -> Ends | None:
        """How it failed, if it did."""
        return None if self.status == 200 else (self.status, self.body["error"]["code"])


class Asker:
    """A client of one cluster."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def ask(self, ask: Ask, **headers: str) -> Answer:
        """Return the answer to ``ask``."""
        return await self.post("/v1/completions", ask.body, headers)

    async def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Answer:
        """Return the answer to any request."""
        try:
            response = await self._http.post(path, json=body, headers=headers)
        except (httpx.TransportError, AttributeError) as error:
            # anyio asks a new connection for its peer: uvloop has no socket if the server has closed it already
            if isinstance(error, AttributeError) and error.name != "getpeername":
                raise
            return Answer(0, {"error": {"code": CONNECTION_LOST[1], "message": repr(error)}}, httpx.Headers())
        return Answer(response.status_code, response.json(), response.headers)

    async def get(self, path: str) -> Answer:
        """Return the answer to a GET."""
        response = await self._http.get(path)
        return Answer(response.status_code, response.json(), response.headers)

    @asynccontextmanager
    async def streaming(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Give the chunks of a streamed answer; leaving early hangs up."""
        async with self._http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            yield chunks(response)

    async def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return all chunks of a streamed answer."""
        async with self.streaming(path, body) as parts:
            return [part async for part in parts]

    async def stream_tokens(self, ask: Ask) -> list[int]:
        """Return the tokens of the streamed answer to ``ask``."""
        parts = await self.stream("/v1/completions", ask.body)
        return [token_id for part in parts for token_id in part["choices"][0]["token_ids"]]

    async def hang_up(self, ask: Ask, num_chunks: int) -> None:
        """Read ``num_chunks`` of the streamed answer to ``ask`` and leave."""
        async with self.streaming("/v1/completions", ask.body) as parts:
            for _ in range(num_chunks):
                await anext(parts)


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a stream of server-sent events. Fails unless it ends as it should."""
    done = False
    async for line in lines(response):
        assert not done or not line, f"after [DONE]: {line}"
        if line == "data: [DONE]":
            done = True
        elif line:
            yield json.loads(line.removeprefix("data: "))
    assert done, "the stream ended without [DONE]"


async def lines(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the lines of a stream as server-sent events define them. httpx also splits at U+0085, U+2028 and others."""
    rest = b""
    async for part in response.aiter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode()
    assert not rest, f"the stream ended within a line: {rest!r}"


def play(cluster: Cluster, scenario: Callable[[Asker], Coroutine[Any, Any, T]], *, keep_alive: bool = False) -> T:
    """Run ``scenario`` with a client of ``cluster``, which may keep its connections."""

    async def bounded() -> T:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE_S, trust_env=False, limits=limits) as http:
            return await asyncio.wait_for(scenario(Asker(http)), 2 * PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


async def at_once(limit: int, jobs: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Return the results of ``jobs``, of which ``limit`` are under way at any time."""
    gate = asyncio.Semaphore(limit)

    async def one(job: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await job()

    return await asyncio.gather(*(one(job) for job in jobs))


def answers(cluster: Cluster, asks: Sequence[Ask], *, limit: int = 16) -> list[Answer]:
    """Return the answers to ``asks``, ``limit`` at once."""
    return answers_while(cluster, asks, lambda: None, limit=limit)


def answers_while(
    cluster: Cluster,
    asks: Sequence[Ask],
    act: Callable[[], object],
    *,
    limit: int = 16,
    first: int = 0,
    keep_alive: bool = False,
) -> list[Answer]:
    """Return the answers to ``asks``, ``limit`` at once; when ``first`` of them are there, ``act`` takes its course."""

    async def scenario(asker: Asker) -> list[Answer]:
        num_answered = 0
        enough = asyncio.Event()

        async def one(ask: Ask) -> Answer:
            nonlocal num_answered
            answer = await asker.ask(ask)
            num_answered += 1
            if num_answered >= first:
                enough.set()
            return answer

        load = asyncio.ensure_future(at_once(limit, [partial(one, ask) for ask in asks]))
        try:
            if first:
                await enough.wait()
            await asyncio.to_thread(act)
            return await load
        finally:
            load.cancel()

    return play(cluster, scenario, keep_alive=keep_alive)


def assert_right(cluster: Cluster, asks: Sequence[Ask], given: Sequence[Answer], *ends: Ends) -> int:
    """Check that each answer holds exactly the expected tokens, or is one of the errors ``ends``.

    Returns how many were answered with tokens.
    """
    num_good = 0
    for ask, answer in zip(asks, given, strict=True):
        if answer.end is None:
            assert answer.token_ids == ask.expected(cluster.fake())
            num_good += 1
        else:
            assert answer.end in ends, answer.body
    return num_good
