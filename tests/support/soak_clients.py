"""The clients of ``tests/soak.py``: each asks, checks every token, hangs up or cancels now and then, and asks again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from support.asking import Ask, chunks, random_prompt
from support.cluster import Cluster
from support.soak_tally import Tally

LOST_S = 180.0
"""A request without an answer for that long is lost."""

STREAMED = 0.75
HANGS_UP = 0.05
CANCELS = 0.05
SHARED_PREFIX = 0.3
RETRY_AFTER_S = 0.5
"""A client waits that long after an error."""

LEAVE_S = 0.6
"""A client hangs up, or has its request cancelled, at a random time up to this after it asked."""

_SHARED = random_prompt(random.Random(1), 64)

UNAVAILABLE = frozenset({"no_node_available", "transfer_failed", "transfer_timeout", "peer_lost", "corrupt_kv"})
"""Codes of the errors that faults may cause."""


class ConnectionCutError(Exception):
    """The connection ended before the answer did."""


@dataclass
class Reply:
    """What has come so far: tokens, when each came, and the error's status and code if there was one."""

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    error: tuple[int, str] | None = None

    def take(self, part: dict[str, Any], status: int) -> None:
        """Take a chunk or a whole answer."""
        if "error" in part:
            assert self.error is None, f"a second error: {part}"
            self.error = (status, part["error"]["code"])
            return
        token_ids = part["choices"][0]["token_ids"] if part["choices"] else []
        self.token_ids += token_ids
        self.times_s += [time.monotonic()] * len(token_ids)


class Client:
    """Asks one request after the other, until ``until_s``. ``may_cut_since``: tells whether a cut has a reason."""

    def __init__(
        self,
        cluster: Cluster,
        http: httpx.AsyncClient,
        tally: Tally,
        seed: str,
        may_cut_since: Callable[[float], bool],
    ) -> None:
        self._cluster = cluster
        self._http = http
        self._tally = tally
        self._seed = seed
        self._rng = random.Random(seed)
        self._may_cut_since = may_cut_since

    async def run(self, until_s: float) -> None:
        """Ask until then."""
        while time.monotonic() < until_s:
            prompt = [
                *(_SHARED if self._rng.random() < SHARED_PREFIX else []),
                *random_prompt(self._rng, self._rng.randint(1, 200)),
            ]
            ask = Ask(prompt, self._rng.randint(1, 120), self._rng.choice([0.0, 0.9]), self._rng.getrandbits(31))
            self._tally.requests += 1
            outcome = await self._outcome(ask)
            self._tally.outcomes[outcome] += 1
            if outcome in ("wrong", "lost", "refused"):
                print(f"{self._tally.name}: {outcome}: {ask}", flush=True)
            if outcome == "failed":
                await asyncio.sleep(RETRY_AFTER_S)

    async def _outcome(self, ask: Ask) -> str:
        """Ask until there is an answer, whatever it is."""
        fate = self._rng.random()
        name = f"{self._seed}-{self._tally.requests}".replace(" ", "-")
        while True:
            began_s = time.monotonic()
            try:
                if fate < HANGS_UP:
                    return await self._hang_up(ask, name)
                cancels = fate < HANGS_UP + CANCELS
                async with asyncio.timeout(LOST_S):
                    reply = await (self._cancelled(ask, name) if cancels else self._ask(ask, name))
            except TimeoutError:
                return "lost"
            except httpx.ConnectError as error:
                print(repr(error), flush=True)
                return "refused"
            except ConnectionCutError:
                if not self._may_cut_since(began_s):
                    return "lost"
                self._tally.cut += 1
                continue
            self._tally.longest_request_s = max(self._tally.longest_request_s, time.monotonic() - began_s)
            return self._judged(ask, reply, may_be_cancelled=cancels)

    def _judged(self, ask: Ask, reply: Reply, *, may_be_cancelled: bool) -> str:
        self._tally.tokens += len(reply.token_ids)
        self._tally.gaps_s += [b - a for a, b in zip(reply.times_s, reply.times_s[1:], strict=False)]
        expected = ask.expected(self._cluster.fake())
        if reply.error is None:
            return "right" if reply.token_ids == expected else "wrong"
        if reply.token_ids != expected[: len(reply.token_ids)]:
            return "wrong"
        status, code = reply.error
        if code == "request_cancelled" and may_be_cancelled:
            return "cancelled"
        self._tally.errors[f"{status} {code}"] += 1
        return "failed" if code in UNAVAILABLE else "wrong"

    async def _ask(self, ask: Ask, name: str) -> Reply:
        """Return the reply. Raises ConnectionCutError."""
        reply = Reply()
        streamed = self._rng.random() < STREAMED
        body = {**ask.body, "stream": streamed}
        try:
            async with self._http.stream(
                "POST", "/v1/completions", json=body, headers={"X-Request-Id": name}
            ) as response:
                if streamed and response.status_code == httpx.codes.OK:
                    async for part in chunks(response):
                        reply.take(part, response.status_code)
                else:
                    await response.aread()
                    reply.take(response.json(), response.status_code)
                    reply.times_s.clear()
        except httpx.ConnectError:
            raise
        except (httpx.TransportError, AttributeError) as error:
            # anyio asks a new connection for its peer: uvloop has no socket if the server has closed it already
            if isinstance(error, AttributeError) and error.name != "getpeername":
                raise
            raise ConnectionCutError from error
        return reply

    async def _hang_up(self, ask: Ask, name: str) -> str:
        """Leave at any time, perhaps after the end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rng.uniform(0, LEAVE_S)):
                await self._ask(ask, name)
        return "hung_up"

    async def _cancelled(self, ask: Ask, name: str) -> Reply:
        """Have an operator cancel the request at any time, perhaps too early or too late."""
        asking = asyncio.ensure_future(self._ask(ask, name))
        try:
            await asyncio.sleep(self._rng.uniform(0, LEAVE_S))
            with suppress(httpx.HTTPError, AttributeError):  # there is no router now; as in ``_ask``
                await self._http.delete(f"{self._cluster.config.router.admin_url}/cluster/requests/{name}")
            return await asking
        finally:
            asking.cancel()
