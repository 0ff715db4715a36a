"""The plans submitted to a node's engine and not yet answered."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import StepDone, StepFailed
from kvrelay.node.plans import Chunk
from kvrelay.protocol.messages.engine import SequenceFailed, SequenceOutcome, StepPlan

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class PlanInFlight(Generic[R]):
    """``plan`` computes ``chunks[i]`` of ``requests[i]``. It was submitted at ``submitted_s``."""

    plan: StepPlan
    requests: list[R]
    chunks: list[Chunk]
    submitted_s: float

    def seconds(self, last_ended_s: float, now: float) -> float:
        """Return how long it took: up to ``now``, without the time until the plan before it ended."""
        return max(0.0, now - max(self.submitted_s, last_ended_s))

    def outcomes(self, event: StepDone | StepFailed) -> list[SequenceOutcome]:
        """Return the outcome of each request, in the order of ``requests``. If the step failed, all failed."""
        if isinstance(event, StepFailed):
            return [SequenceFailed(event.reason, retryable=True)] * len(self.requests)
        by_id = event.result.outcomes
        return [by_id[item.id] for item in self.plan.batch]


class PlansInFlight(Generic[R]):
    """At most ``limit`` plans, oldest first. Each uses the blocks of its requests until it has ended."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._plans: deque[PlanInFlight[R]] = deque()

    def __len__(self) -> int:
        return len(self._plans)

    def __contains__(self, request: R) -> bool:
        return any(request in plan.requests for plan in self._plans)

    @property
    def has_room(self) -> bool:
        """Whether another plan may be submitted now."""
        return len(self._plans) < self._limit

    def chunks(self) -> dict[R, Chunk]:
        """Return the last chunk in flight of each request."""
        return {
            request: chunk for plan in self._plans for request, chunk in zip(plan.requests, plan.chunks, strict=True)
        }

    def begin(self, plan: PlanInFlight[R]) -> None:
        """Add a submitted plan."""
        self._plans.append(plan)

    def _find(self, step: int) -> PlanInFlight[R]:
        """Return the plan of ``step``. Raises LocalProtocolError if it is not in flight."""
        for plan in self._plans:
            if plan.plan.step == step:
                return plan
        raise LocalProtocolError(f"step {step} is not in flight: it has ended, or was never planned")

    def end(self, event: StepDone | StepFailed) -> PlanInFlight[R]:
        """Remove and return the answered plan. Raises LocalProtocolError if it is not the oldest."""
        step = event.result.step if isinstance(event, StepDone) else event.step
        plan = self._find(step)
        if plan is not self._plans[0]:
            raise LocalProtocolError(f"step {step} has ended before step {self._plans[0].plan.step}")
        return self._plans.popleft()
