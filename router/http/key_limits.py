"""How much each API key uses, and whether it may use more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from router.http.api_keys import ApiKey

_MINUTE_S = 60.0


class KeyUse:
    """Requests in progress and tokens of one key.

    Tokens are counted when an answer has ended, so a key may go beyond its tokens by what is in progress. It then waits
    until the excess is paid back: ``tokens_per_minute`` tokens become available evenly over each minute.
    """

    def __init__(self, now: float) -> None:
        self.num_requests = 0
        self._spent_tokens = 0.0
        self._updated_s = now

    def begin(self) -> None:
        """Count a request that begins."""
        self.num_requests += 1

    def end(self) -> None:
        """Count a request that has ended."""
        self.num_requests -= 1

    def charge(self, num_tokens: int) -> None:
        """Count the tokens of an answer."""
        self._spent_tokens += num_tokens

    def wait_s(self, key: ApiKey, now: float) -> float:
        """Return in how many seconds ``key`` may send another request: 0 now, inf when one of its requests ends."""
        if key.max_requests is not None and self.num_requests >= key.max_requests:
            return math.inf
        if key.tokens_per_minute is None:
            return 0.0
        excess = self._spent(key.tokens_per_minute, now) - key.tokens_per_minute
        return max(0.0, (excess + 1) * _MINUTE_S / key.tokens_per_minute) if excess >= 0 else 0.0

    def headers(self, key: ApiKey, now: float) -> list[tuple[bytes, bytes]]:
        """Return the headers that tell the client of its limits, with OpenAI's names."""
        headers: list[tuple[str, object]] = []
        if key.max_requests is not None:
            remaining = max(0, key.max_requests - self.num_requests)
            headers += [("limit-requests", key.max_requests), ("remaining-requests", remaining)]
        if key.tokens_per_minute is not None:
            spent = self._spent(key.tokens_per_minute, now)
            reset_s = spent * _MINUTE_S / key.tokens_per_minute
            headers += [
                ("limit-tokens", key.tokens_per_minute),
                ("remaining-tokens", max(0, math.floor(key.tokens_per_minute - spent))),
                ("reset-tokens", f"{reset_s:.3f}s"),
            ]
        return [(f"x-ratelimit-{name}".encode(), str(value).encode()) for name, value in headers]

    def _spent(self, tokens_per_minute: int, now: float) -> float:
        elapsed_s, self._updated_s = now - self._updated_s, now
        self._spent_tokens = max(0.0, self._spent_tokens - elapsed_s * tokens_per_minute / _MINUTE_S)
        return self._spent_tokens


class Use(Protocol):
    """One request with a key. ``wait_s``: seconds until the client may try again; 0: the request has begun."""

    wait_s: float

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that tell the client of its limits."""

    def charge(self, num_tokens: int) -> None:
        """Count the tokens of its answer."""

    def end(self) -> None:
        """Count it as ended. Called once, if it has begun."""


class Uses(Protocol):
    """How much the keys use."""

    async def begin(self, key: ApiKey) -> Use:
        """Begin a request with ``key`` if its limits allow."""


class KeyUses:
    """What all keys of a router use. ``now`` returns the time in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._by_name: dict[str, KeyUse] = {}

    async def begin(self, key: ApiKey) -> Use:
        """See Uses."""
        return self.begin_now(key)

    def begin_now(self, key: ApiKey) -> Use:
        """Begin a request with ``key`` if its limits allow."""
        now = self._now()
        return CountedUse(self._by_name.setdefault(key.name, KeyUse(now)), key, self._now)


class CountedUse:
    """One request with ``key``, whose use is ``counts``. See Use."""

    def __init__(self, counts: KeyUse, key: ApiKey, now: Callable[[], float]) -> None:
        self._counts = counts
        self._key = key
        self._now = now
        self.wait_s = counts.wait_s(key, now())
        if self.wait_s == 0:
            counts.begin()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """See Use."""
        return self._counts.headers(self._key, self._now())

    def charge(self, num_tokens: int) -> None:
        """See Use."""
        self._counts.charge(num_tokens)

    def end(self) -> None:
        """See Use."""
        self._counts.end()
