"""The router's state of one request, from admission to its terminal delivery."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from kvrelay.errors import KVRelayError, NoNodeError, TransferTimeoutError
from kvrelay.machine.lifecycle import Lifecycle, Table
from kvrelay.protocol.block_hash import PREFIX_KEY_BYTES
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.request import RequestSpec, SamplingParams
from router.events import NewRequest
from router.node_table import Node
from router.output import OutputOrder, PromptOrder
from router.prediction import Prediction

_PREFIX = re.compile(r"^[a-z]+[-_]")
"""What an API puts before the client's part of an answer's id."""

WITHOUT_PROMPT_LOGPROBS = PromptOrder(0)
"""Of requests that want none: it takes nothing, so all of them share it."""

MAX_ROUTED_BLOCKS = 4096
"""Blocks that routing compares with prefix caches for prompts that are dispatched together.

Their hashes take about 3 ms of the router's loop.
"""

TimerKind: TypeAlias = Literal["deadline", "retry", "seek"]


class RequestTimer(NamedTuple):
    """Key of a request's timers: its deadline, its next attempt, its next search for a decode node."""

    request_id: RequestId
    kind: TimerKind


class Status(StrEnum):
    """Status of a request."""

    WAITING = "waiting"
    """Admitted and on no node: before dispatch, or before the next attempt."""
    RUNNING = "running"
    """Assigned to its nodes."""
    SEEKING_DECODE = "seeking_decode"
    """On P, computing or computed, without a decode node."""
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
    """One request and its current attempt.

    ``prefill`` and ``decode``: nodes that may hold state of the attempt (a mixed node is ``decode``). ``avoid``: nodes
    that failed it. ``participants``: all nodes that were assigned in the current attempt. ``refused_by``: decode nodes
    that refused it. ``is_prompt_pending``: its nodes count prompt tokens of it that are still to compute.
    ``num_preempted_blocks``: blocks it waits for after a preemption, None if it is not known to wait.
    ``timers``: those that were set, whether they have fired or not.
    ``predictions``: the raw and the corrected one of its current attempt, and when that began, if the policy predicts.
    """

    __slots__ = (
        "_num_routed_blocks",
        "_prefix_keys",
        "arrival_s",
        "attempts",
        "avoid",
        "decode",
        "epoch",
        "is_prompt_pending",
        "lifecycle",
        "new",
        "num_cached_tokens",
        "num_preempted_blocks",
        "output",
        "participants",
        "predictions",
        "prefill",
        "prompt",
        "refused_by",
        "timers",
    )

    def __init__(self, new: NewRequest, now: float) -> None:
        self.new = new
        self.arrival_s = now
        self.lifecycle = Lifecycle(f"request {new.request_id}", TRANSITIONS, Status.WAITING, now)
        self.output = OutputOrder()
        self.prompt = WITHOUT_PROMPT_LOGPROBS
        if new.sampling.num_prompt_logprobs is not None:
            self.prompt = PromptOrder(len(new.prompt_token_ids))
        self.timers: dict[TimerKind, RequestTimer] = {}
        self.attempts = 0
        self.epoch = 0
        self.prefill: PeerId | None = None
        self.decode: PeerId | None = None
        self.avoid: set[PeerId] = set()
        self.is_prompt_pending = False
        self.participants: set[PeerId] = set()
        self.refused_by: set[PeerId] = set()
        self.num_cached_tokens = 0
        self.num_preempted_blocks: int | None = None
        self.predictions: tuple[Prediction, Prediction, float] | None = None
        self._num_routed_blocks = MAX_ROUTED_BLOCKS
        self._prefix_keys: list[bytes] | None = None

    @property
    def request_id(self) -> RequestId:
        """The id used by client, router and nodes."""
        return self.new.request_id

    @property
    def names(self) -> tuple[str, str, str]:
        """Its id, the id of its answer, and the client's own part of that."""
        answer_id = self.new.answer_id
        return self.request_id, answer_id, _PREFIX.sub("", answer_id)

    @property
    def status(self) -> Status:
        """Its current status."""
        return self.lifecycle.status

    @property
    def nodes(self) -> list[PeerId]:
        """The nodes that may hold state of the current attempt."""
        return [peer for peer in (self.prefill, self.decode) if peer is not None]

    @property
    def num_tokens(self) -> int:
        """Prompt and delivered output tokens: the tokens the next attempt has to compute."""
        return len(self.new.prompt_token_ids) + len(self.output.token_ids)

    @property
    def wants_one_token(self) -> bool:
        """Whether the next token is the last, or none is wanted, so that no decode node is needed."""
        return self.new.sampling.max_tokens - len(self.output.token_ids) <= 1

    def prefix_keys(self, node: Node) -> list[bytes]:
        """Return the prefix keys of the first full blocks of the prompt: its share of ``MAX_ROUTED_BLOCKS``.

        All nodes have one KV geometry, so the keys are the same for each. They are computed at the first call.
        """
        if self._prefix_keys is None:
            num_tokens = self._num_routed_blocks * node.block_size
            hashes = node.hasher.hashes(self.new.prompt_token_ids[:num_tokens])
            self._prefix_keys = [block_hash[:PREFIX_KEY_BYTES] for block_hash in hashes]
        return self._prefix_keys

    def route_by(self, num_blocks: int) -> None:
        """Compare at most ``num_blocks`` blocks with prefix caches. No effect on keys that are computed already."""
        self._num_routed_blocks = num_blocks

    def num_cached_on(self, node: Node) -> int:
        """Return how many tokens ``node`` need not compute because its prefix cache has them.

        One it always must, and all of them for log probabilities of the prompt.
        """
        if not self.prompt.is_complete:
            return 0
        num_blocks = node.prefixes.num_cached_blocks(self.prefix_keys(node))
        return min(num_blocks * node.block_size, self.num_tokens - 1)

    def next_attempt(self, epoch: int) -> RequestSpec:
        """Begin an attempt that continues after the tokens already delivered; return the request spec for its node."""
        self.attempts += 1
        self.epoch = epoch
        self.num_preempted_blocks = None
        self.output.drop_early()
        self.participants = set(self.nodes)
        self.refused_by.clear()
        return RequestSpec(
            request_id=self.request_id,
            epoch=epoch,
            prompt_token_ids=self.new.prompt_token_ids,
            sampling=self._sampling(),
            output_token_ids=list(self.output.token_ids),
            priority=self.new.priority,
            arrival_s=self.arrival_s,
        )

    def _sampling(self) -> SamplingParams:
        """Return the sampling params of the next attempt: without what the client has of the prompt already."""
        sampling = self.new.sampling
        if sampling.num_prompt_logprobs is None or not self.prompt.is_complete:
            return sampling
        return msgspec.structs.replace(sampling, num_prompt_logprobs=None)

    def overdue(self, timeout_s: float) -> KVRelayError:
        """Return the error of a request that exceeded ``timeout_s``."""
        if self.status is Status.SEEKING_DECODE:
            return NoNodeError(f"no decode node had room within {timeout_s:g} s")
        if self.status is Status.WAITING:
            return NoNodeError(f"no node could take the request within {timeout_s:g} s")
        return TransferTimeoutError(f"the request was not done within {timeout_s:g} s")


def share_routed_blocks(requests: Sequence[RoutedRequest]) -> None:
    """Give each of ``requests``, which one event dispatches, an equal share of ``MAX_ROUTED_BLOCKS``, at least 1."""
    for request in requests:
        request.route_by(max(1, MAX_ROUTED_BLOCKS // len(requests)))
