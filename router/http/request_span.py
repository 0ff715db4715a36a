"""Which requests belong to an HTTP request that is traced. Knows no tracing library, so that it costs none."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Scope

from kvrelay.protocol.ids import RequestId

SPAN = "kvrelay.traced_requests"
"""The key of the scope under which a traced HTTP request keeps the ids of its requests."""


def note_requests(scope: Scope, request_ids: Sequence[RequestId]) -> None:
    """Note the requests of this HTTP request if it is traced."""
    noted: list[RequestId] | None = scope.get(SPAN)
    if noted is not None:
        noted += request_ids
