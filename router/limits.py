"""What a router takes on, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the router takes on and how long it tries.

    ``node_wait_s``: how long a request waits for a node to come back when none could take it. ``peer_timeout_s``: how
    long a dead node may look alive.
    """

    max_queued_requests: int = 512
    max_attempts: int = 3
    request_timeout_s: float = 600.0
    node_wait_s: float = 30.0
    peer_timeout_s: float = 5.0
    retry_backoff_s: float = 0.05
