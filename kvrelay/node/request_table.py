"""The requests of a node by attempt and by status."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from kvrelay.machine.laws import Laws, Violation
from kvrelay.node.prefill_order import PrefillOrder
from kvrelay.node.request import NodeRequest
from kvrelay.protocol.ids import Attempt
from kvstore.blocks.pending_prefixes import PendingPrefixes

R = TypeVar("R", bound=NodeRequest[Any])
R_contra = TypeVar("R_contra", bound=NodeRequest[Any], contravariant=True)
S = TypeVar("S", bound=StrEnum)


class Container(Protocol[R_contra]):
    """Where the requests of one status are, or of several. Called by RequestTable only."""

    def add(self, request: R_contra) -> None:
        """Take in ``request``, whose status is new."""

    def remove(self, request: R_contra) -> None:
        """Take out ``request``."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


class RequestSet(dict[R, None]):
    """Requests in the order in which they came; ``joined`` is told of each."""

    __slots__ = ("_joined",)

    def __init__(self, joined: Callable[[R], None] | None = None) -> None:
        super().__init__()
        self._joined = joined

    def add(self, request: R) -> None:
        """Take in ``request`` as the last."""
        self[request] = None
        if self._joined is not None:
            self._joined(request)

    def remove(self, request: R) -> None:
        """Take out ``request``."""
        del self[request]


class RequestTable(Generic[R, S]):
    """Every request the node knows. A request is in the container of its status, and in no other.

    ``containers`` has each status but the last: a request that reaches a status without container is forgotten. A role
    adds ``order``, the prompts to compute, and ``pending``, the blocks of admitted ones that are to be computed.
    """

    order: PrefillOrder[R]
    pending: PendingPrefixes

    def __init__(self, containers: Mapping[S, Container[R]]) -> None:
        self._containers = containers
        self._by_attempt: dict[Attempt, R] = {}

    def __len__(self) -> int:
        return len(self._by_attempt)

    def __iter__(self) -> Iterator[R]:
        return iter(self._by_attempt.values())

    def find(self, attempt: Attempt) -> R | None:
        """Return the request of ``attempt``, which may be over."""
        return self._by_attempt.get(attempt)

    def open(self) -> list[R]:
        """Return the requests about which something is still to be sent."""
        return [request for request in self if not request.is_over]

    def add(self, request: R) -> None:
        """Take in a new request, with whatever status it begins."""
        self._by_attempt[request.attempt] = request
        self._containers[request.status].add(request)

    def move(self, request: R, to: S, now: float) -> None:
        """Change the status of ``request``, and its container with it.

        Raises LocalProtocolError, having changed nothing, if the table of statuses has no such step.
        """
        before = self._containers.get(request.status)
        request.lifecycle.move(to, now)
        request.is_over = to in request.OVER
        after = self._containers.get(to)
        if after is before:
            return
        if before is not None:
            before.remove(request)
        if after is None:
            del self._by_attempt[request.attempt]
        else:
            after.add(request)

    def laws(self) -> Laws:
        """Check that each request is in the container of its status and in no other; see ``kvrelay.machine.laws``."""
        containers: dict[int, Container[R]] = {id(container): container for container in self._containers.values()}
        found = []
        for request in self:
            places = [key for key, container in containers.items() if request in container]
            if places != [id(self._containers.get(request.status))]:
                text = (
                    f"request {request.spec.request_id}, {request.status}, is not in the container of its status alone"
                )
                found.append(Violation(text))
        num_contained = sum(map(len, containers.values()))
        if num_contained != len(self):
            found.append(Violation(f"{len(self)} requests are known, {num_contained} are in containers"))
        yield found

    def laws_at_rest(self) -> Laws:
        """Check that no prompt is to be computed, and ``laws``."""
        if len(self.order) or len(self.pending):
            yield [Violation("prompts are still in the prefill order")]
        yield from self.laws()
