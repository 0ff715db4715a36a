"""Limits of the router's requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of queueing, attempts and time, in seconds.

    ``node_wait_s``: how long a request waits for a node when none is available. ``peer_timeout_s``: longest time before
    a dead node is declared lost.
    """

    max_queued_requests: int = 512
    max_attempts: int = 3
    request_timeout_s: float = 600.0
    node_wait_s: float = 30.0
    peer_timeout_s: float = 5.0
    retry_backoff_s: float = 0.05
