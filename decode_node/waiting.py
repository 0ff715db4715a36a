"""The requests that wait for blocks, in the order in which they get them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from decode_node.request import DecodeRequest
from kvrelay.core.config import SchedulerConfig


class WaitingQueue:
    """First come, first served; a preempted request goes to the front (``requeue: front``) or back again.

    With priority scheduling the most urgent comes first, and waiting makes urgent: ``priority_aging_s`` seconds count
    as one level, so nobody waits for ever. Among equally urgent requests the queue's order holds.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._requests: deque[DecodeRequest] = deque()
        self._to_front = config.requeue == "front"
        self._by_priority = config.enable_priority_scheduling
        self._aging_s = config.priority_aging_s

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[DecodeRequest]:
        return iter(self._requests)

    def add(self, request: DecodeRequest) -> None:
        """Append a newcomer."""
        self._requests.append(request)

    def requeue(self, victims: list[DecodeRequest]) -> None:
        """Put back the victims of one step, those that began to decode first in front."""
        ordered = sorted(victims, key=lambda request: request.arrival_s)
        if self._to_front:
            self._requests.extendleft(reversed(ordered))
        else:
            self._requests.extend(ordered)

    def remove(self, request: DecodeRequest) -> None:
        """Take ``request`` out, wherever it stands."""
        self._requests.remove(request)

    def ordered(self, now: float) -> list[DecodeRequest]:
        """Return all who wait, the next one first."""
        if not self._by_priority:
            return list(self._requests)
        return sorted(self._requests, key=lambda request: self.urgency(request, now))

    def urgency(self, request: DecodeRequest, now: float) -> float:
        """Return the priority of ``request`` less what it has earned by waiting; lower is sooner."""
        return request.priority - (now - request.arrival_s) / self._aging_s
