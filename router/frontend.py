"""What the HTTP endpoints need of the process they run in: the router's own, or a worker (``router/workers``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.machine.clock import Clock
from kvrelay.protocol.ids import RequestId
from router.body_memory import BodyMemory
from router.events import Delivery, NewRequest
from router.model import ServedModel
from router.preparation_pool import Preparer

STOPPING = "the router is stopping"
"""Why a router that ends serves nothing more."""

Sink: TypeAlias = Callable[[RequestId, Delivery], None]
"""Takes the deliveries of a request."""


class Frontend(Protocol):
    """The process's config, model and parts, and the way to the machine. ``started_s``: when the router started."""

    config: ClusterConfig
    model: ServedModel
    clock: Clock
    preparer: Preparer
    body_memory: BodyMemory
    started_s: float

    @property
    def max_model_len(self) -> int:
        """The longest sequence this cluster serves, in tokens."""

    def submit(self, requests: Sequence[NewRequest], deliver: Sink) -> None:
        """Submit ``requests``; ``deliver(request_id, delivery)`` is called for each delivery until all have ended.

        Raises KVRelayError if they are refused at once.
        """

    async def any_in_progress(self, request_ids: Sequence[RequestId]) -> bool:
        """Return whether a request with one of these ids has been submitted and has not ended."""

    def stop_matched(self, request_id: RequestId) -> None:
        """Report that the text contains a stop string, so that no more tokens are needed."""

    def client_disconnected(self, request_id: RequestId) -> None:
        """Report that the client has disconnected."""
