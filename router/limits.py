"""Limits of the router's requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttemptLimits:
    """Limits of one request's attempts; see ``Limits``."""

    max_attempts: int
    node_wait_s: float
    peer_timeout_s: float
    retry_backoff_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of queueing, attempts and time, in seconds.

    ``node_wait_s``: how long a request waits for a node when none is available. ``peer_timeout_s``: longest time before
    a dead node is declared lost. ``ttft_slo_s``: the longest time to first token that may be predicted for a request
    that gives none itself; None: any.
    """

    max_queued_requests: int = 512
    max_attempts: int = 3
    request_timeout_s: float = 600.0
    node_wait_s: float = 30.0
    peer_timeout_s: float = 5.0
    retry_backoff_s: float = 0.05
    ttft_slo_s: float | None = None

    @property
    def attempts(self) -> AttemptLimits:
        """The limits of a request's attempts."""
        return AttemptLimits(self.max_attempts, self.node_wait_s, self.peer_timeout_s, self.retry_backoff_s)
