"""A request as the router keeps it, from admission to its terminal delivery."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple, TypeAlias, get_args

from kvrelay.errors import KVRelayError, NoNodeError, TransferTimeoutError
from kvrelay.machine.lifecycle import Lifecycle, Table
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.request import RequestSpec
from router.events import NewRequest
from router.output import OutputOrder

TimerKind: TypeAlias = Literal["deadline", "retry", "seek"]
TIMER_KINDS: tuple[TimerKind, ...] = get_args(TimerKind)


class RequestTimer(NamedTuple):
    """Key of a request's timers: its last moment, its next attempt, its next search for a decode node."""

    request_id: str
    kind: TimerKind


class Status(StrEnum):
    """Where a request stands."""

    WAITING = "waiting"
    """Admitted, and no node has it: about to be dispatched, or a node was lost."""
    RUNNING = "running"
    """Its nodes work on it."""
    SEEKING_DECODE = "seeking_decode"
    """P works on it or is done, and no decode node has had room for it yet."""
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


_ENDS = frozenset({Status.FINISHED, Status.FAILED, Status.ABORTED})

TRANSITIONS: Table[Status] = {
    Status.WAITING: _ENDS | {Status.RUNNING},
    Status.RUNNING: _ENDS | {Status.SEEKING_DECODE, Status.WAITING},
    Status.SEEKING_DECODE: _ENDS | {Status.RUNNING, Status.WAITING},
    Status.FINISHED: frozenset(),
    Status.FAILED: frozenset(),
    Status.ABORTED: frozenset(),
}


class RoutedRequest:
    """One request and its present attempt.

    ``prefill`` and ``decode``: nodes that may hold something of the attempt (a mixed node is ``decode``). ``avoid``:
    nodes that failed it. ``refused_by``: decode nodes that had no room for the present attempt.
    ``num_preempted_blocks``: what it waits for after a preemption, None while it is not known to wait.
    """

    __slots__ = (
        "arrival_s",
        "attempts",
        "avoid",
        "decode",
        "epoch",
        "lifecycle",
        "new",
        "num_cached_tokens",
        "num_preempted_blocks",
        "output",
        "prefill",
        "refused_by",
    )

    def __init__(self, new: NewRequest, now: float) -> None:
        self.new = new
        self.arrival_s = now
        self.lifecycle = Lifecycle(f"request {new.request_id}", TRANSITIONS, Status.WAITING, now)
        self.output = OutputOrder()
        self.attempts = 0
        self.epoch = 0
        self.prefill: PeerId | None = None
        self.decode: PeerId | None = None
        self.avoid: set[PeerId] = set()
        self.refused_by: set[PeerId] = set()
        self.num_cached_tokens = 0
        self.num_preempted_blocks: int | None = None

    @property
    def request_id(self) -> str:
        """The id that client, router and nodes know it by."""
        return self.new.request_id

    def timer(self, kind: TimerKind) -> RequestTimer:
        """Return the key of its timer of ``kind``."""
        return RequestTimer(self.new.request_id, kind)

    @property
    def status(self) -> Status:
        """Where it stands."""
        return self.lifecycle.status

    @property
    def nodes(self) -> list[PeerId]:
        """The nodes that may hold something of the present attempt."""
        return [peer for peer in (self.prefill, self.decode) if peer is not None]

    @property
    def num_tokens(self) -> int:
        """Prompt and delivered output tokens: what the next attempt has to compute."""
        return len(self.new.prompt_token_ids) + len(self.output.token_ids)

    @property
    def wants_one_token(self) -> bool:
        """Whether the next token is the last, so that no decode node is needed."""
        return self.new.sampling.max_tokens - len(self.output.token_ids) == 1

    def next_attempt(self, epoch: int) -> RequestSpec:
        """Begin a new attempt, which goes on behind the tokens already delivered; return what its node must know."""
        self.attempts += 1
        self.epoch = epoch
        self.num_preempted_blocks = None
        self.output.forget_early()
        self.refused_by.clear()
        return RequestSpec(
            request_id=self.request_id,
            epoch=epoch,
            prompt_token_ids=self.new.prompt_token_ids,
            sampling=self.new.sampling,
            output_token_ids=list(self.output.token_ids),
            priority=self.new.priority,
            arrival_s=self.arrival_s,
        )

    def overdue(self, timeout_s: float) -> KVRelayError:
        """Return the error of a request that was not done in time."""
        if self.status is Status.SEEKING_DECODE:
            return NoNodeError(f"no decode node had room within {timeout_s:g} s")
        if self.status is Status.WAITING:
            return NoNodeError(f"no node could take the request within {timeout_s:g} s")
        return TransferTimeoutError(f"the request was not done within {timeout_s:g} s")
