"""In which order a node computes its prompts: the policies of ``scheduler.prefill_order``."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.node.prompt_waits import PromptWaits
from kvrelay.protocol.prompt_lengths import NUM_LENGTH_CLASSES, length_class

R = TypeVar("R", bound=Hashable)

LOOKAHEAD_STEPS = 2
"""A prompt gets blocks when its turn is at most so many steps away: its reservation or its read from the store then
takes place while others are computed."""

BEGUN_WEIGHT = 0.5
"""Only prompts with less than this share of the tokens that a begun prompt still has to compute go before it."""


@dataclass(slots=True, eq=False)
class Prompt:
    """What an order knows of one prompt.

    ``num_tokens`` are still to compute: what the prefix cache has is not counted. ``overtaken_tokens`` of prompts that
    arrived later have been scheduled before it. ``is_ready``: it has blocks and is not being read from the store.
    ``returns``: it was preempted and goes before all prompts of its urgency.
    """

    number: int
    priority: int
    arrival_s: float
    num_tokens: int
    overtaken_tokens: int = 0
    has_blocks: bool = False
    is_ready: bool = False
    has_begun: bool = False
    returns: bool = False


class PrefillOrder(ABC, Generic[R]):
    """Every prompt of a node that is not computed yet, from its arrival to its first token, and who goes first.

    The caller reports what happens to each request. ``version`` changes whenever the order of those that are queued may
    have changed.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._by_priority = config.enable_priority_scheduling
        self._aging_s = config.priority_aging_s
        self._step_tokens = config.max_num_batched_tokens
        self._overtake_tokens = config.prefill_overtake_tokens
        self._prompts: dict[R, Prompt] = {}
        self._holding: dict[R, Prompt] = {}
        self._numbers = itertools.count()
        self.waits = PromptWaits()
        self.version = 0

    def __len__(self) -> int:
        return len(self._prompts)

    # ------------------------------------------------------------ what happens to requests

    def arrived(self, request: R, priority: int, num_tokens: int, now: float) -> None:
        """Take in a newcomer with ``num_tokens`` to compute."""
        self._prompts[request] = Prompt(next(self._numbers), priority, now, num_tokens)
        self.version += 1

    def returned(self, request: R, priority: int, num_tokens: int, arrival_s: float, *, to_front: bool) -> None:
        """Take in a preempted request: to be computed again before all prompts of its urgency, or like a newcomer."""
        prompt = Prompt(next(self._numbers), priority, arrival_s, num_tokens, returns=to_front)
        prompt.has_begun = True  # its wait ended when it ran for the first time
        self._prompts[request] = prompt
        self.version += 1

    def resize(self, request: R, num_tokens: int) -> None:
        """Note that ``num_tokens`` of a queued request are to be computed, as its prefix cache hits are now."""
        self._prompts[request].num_tokens = num_tokens
        self.version += 1

    def admitted(self, request: R, num_tokens: int) -> None:
        """Note that ``request`` has blocks, and ``num_tokens`` to compute unless the store has some of them."""
        prompt = self._holding[request] = self._prompts[request]
        prompt.has_blocks, prompt.num_tokens = True, num_tokens

    def ready(self, request: R, num_tokens: int) -> None:
        """Note that ``num_tokens`` of ``request`` can be computed from now on."""
        prompt = self._prompts[request]
        prompt.is_ready, prompt.num_tokens = True, num_tokens

    def left(self, request: R) -> None:
        """Note that the prompt of ``request`` is computed or given up, if that is not known yet."""
        self._prompts.pop(request, None)
        self._holding.pop(request, None)

    def computing(self, chunks: Iterable[tuple[R, int]], now: float) -> None:
        """Note the tokens of each prompt that the next step computes."""
        scheduled = dict(chunks)
        for request, num_tokens in scheduled.items():
            self._begin(self._prompts[request], num_tokens, now)
        later: dict[int, int] = {}
        for request, prompt in reversed(self._prompts.items()):
            if prompt.returns:
                continue
            if prompt.is_ready or not prompt.has_blocks:
                prompt.overtaken_tokens += later.get(prompt.priority, 0)
            if request in scheduled:
                later[prompt.priority] = later.get(prompt.priority, 0) + scheduled[request]
        if scheduled:
            self.version += 1

    def _begin(self, prompt: Prompt, num_tokens: int, now: float) -> None:
        if not prompt.has_begun:
            self.waits.observe(prompt.num_tokens, now - prompt.arrival_s)
        prompt.has_begun = True
        prompt.num_tokens -= num_tokens

    # ------------------------------------------------------------ who goes first

    def urgency(self, priority: int, arrival_s: float, now: float) -> float:
        """Return ``priority`` less what has been earned by waiting since ``arrival_s``; lower is sooner."""
        return priority - (now - arrival_s) / self._aging_s

    @abstractmethod
    def running(self, requests: Iterable[R], now: float) -> list[R]:
        """Return ``requests``, which are ready and in order of admission, in the order in which they are computed."""

    @abstractmethod
    def queued(self, requests: Iterable[R], now: float) -> list[R]:
        """Return ``requests``, which wait in order of arrival, in the order in which they get blocks."""

    @abstractmethod
    def merged(self, running: Iterable[R], queued: Iterable[R], now: float) -> list[R]:
        """Return both in one order, for a node that gives blocks and computes in the same step."""

    def may_wait_for_a_block(self, request: R) -> bool:
        """Return whether a queued request may wait for a block that another computes.

        Not for one that may be less urgent: others that are more urgent than that one would delay it.
        """
        if not self._by_priority:
            return True
        priority = self._prompts[request].priority
        return not any(prompt.priority > priority for prompt in self._holding.values())

    @abstractmethod
    def may_overtake(self, request: R) -> bool:
        """Return whether a queued request may have blocks before older ones that are queued."""

    @abstractmethod
    def begins_soon(self, request: R, now: float) -> bool:
        """Return whether the turn of a queued request would come within ``LOOKAHEAD_STEPS``."""

    # ------------------------------------------------------------ requests whose prompts others compute

    def may_be_passed(self, priority: int, num_tokens: int) -> bool:
        """Return whether a prompt of ``num_tokens`` that another node computes may have blocks before those queued."""
        oldest: dict[int, Prompt] = {}
        for prompt in self._queued_up_to(priority):
            oldest.setdefault(prompt.priority, prompt)
        return all(self._can_be_overtaken(prompt, num_tokens) for prompt in oldest.values())

    def passed(self, priority: int, num_tokens: int) -> None:
        """Note that such a prompt has got its blocks."""
        for prompt in self._queued_up_to(priority):
            prompt.overtaken_tokens += num_tokens
        self.version += 1

    def _queued_up_to(self, priority: int) -> list[Prompt]:
        """Return the newcomers in the queue that are not less urgent than ``priority``, the oldest first."""
        return [p for p in self._prompts.values() if not p.has_blocks and not p.returns and p.priority <= priority]

    def _can_be_overtaken(self, queued: Prompt, num_tokens: int) -> bool:
        """Return whether ``queued`` may be overtaken by ``num_tokens`` more than by those that have blocks already."""
        outstanding = sum(
            prompt.num_tokens
            for prompt in self._holding.values()
            if prompt.number > queued.number and prompt.priority == queued.priority and not prompt.returns
        )
        return queued.overtaken_tokens + outstanding + num_tokens <= self._overtake_tokens

    # ------------------------------------------------------------ for metrics and the router

    def longest_wait_s(self, now: float) -> float:
        """Return for how many seconds the oldest prompt that has not begun has waited."""
        return max((now - prompt.arrival_s for prompt in self._prompts.values() if not prompt.has_begun), default=0.0)

    def tokens_by_length(self) -> list[int]:
        """Return the tokens still to compute by class of how many that are for one prompt."""
        totals = [0] * NUM_LENGTH_CLASSES
        for prompt in self._prompts.values():
            totals[length_class(prompt.num_tokens)] += prompt.num_tokens
        return totals


class Fifo(PrefillOrder[R]):
    """First come, first served, the more urgent first if there are priorities."""

    def running(self, requests: Iterable[R], now: float) -> list[R]:
        """Return them in order of admission."""
        return self._by_urgency(requests, now)

    def queued(self, requests: Iterable[R], now: float) -> list[R]:
        """Return them in order of arrival."""
        return self._by_urgency(requests, now)

    def merged(self, running: Iterable[R], queued: Iterable[R], now: float) -> list[R]:
        """Return those that run, then those that wait."""
        return [*self.running(running, now), *self.queued(queued, now)]

    def may_overtake(self, request: R) -> bool:
        """Return True: only requests that wait for blocks being computed are overtaken."""
        return True

    def begins_soon(self, request: R, now: float) -> bool:
        """Return True: prompts are computed in the order in which they got blocks."""
        return True

    def _by_urgency(self, requests: Iterable[R], now: float) -> list[R]:
        if not self._by_priority:
            return list(requests)
        prompts = self._prompts
        return sorted(requests, key=lambda r: self.urgency(prompts[r].priority, prompts[r].arrival_s, now))


class ShortestFirst(PrefillOrder[R]):
    """The prompt with fewest tokens still to compute goes first, and how far a prompt is overtaken has a bound.

    **The bound.** Before the last token of a prompt is scheduled, at most ``prefill_overtake_tokens`` tokens of prompts
    of its priority that arrived later are. What is computed while its own KV is read from the store does not count. Two
    rules keep it:

    - A prompt that has been overtaken by all but one step's worth of these tokens goes before all that arrived later.
      Until then its length counts less and less, in proportion.
    - A queued prompt gets blocks before older queued ones only if the tokens of those with blocks, and its own, are not
      more than the oldest may still be overtaken by. So a prompt that waits for blocks waits for requests that are
      counted.

    Of all queued prompts of one priority the oldest has been overtaken most, so only that one need be looked at.

    **Prompts that have begun** have their KV in blocks that others cannot use. Only prompts that need less than
    ``begun_weight`` times as many tokens go before them: with 0.5, and but for prompts near their bound, what is left
    of all that have begun is less than twice what is left of the longest.

    Priorities come first: the level of a prompt is its priority less one for each ``priority_aging_s`` it has waited.
    """

    def __init__(self, config: SchedulerConfig, begun_weight: float | None = None) -> None:
        super().__init__(config)
        self._begun_weight = BEGUN_WEIGHT if begun_weight is None else begun_weight
        self._fair_tokens = config.prefill_overtake_tokens - config.max_num_batched_tokens

    def running(self, requests: Iterable[R], now: float) -> list[R]:
        """Return them by rank."""
        prompts, rank = self._prompts, self._rank
        return sorted(requests, key=lambda request: rank(prompts[request], now))

    def queued(self, requests: Iterable[R], now: float) -> list[R]:
        """Return them by rank."""
        return self.running(requests, now)

    def merged(self, running: Iterable[R], queued: Iterable[R], now: float) -> list[R]:
        """Return all by rank."""
        return self.running(itertools.chain(running, queued), now)

    def _rank(self, prompt: Prompt, now: float) -> tuple[int, float, int]:
        """Return what prompts are sorted by."""
        level = prompt.priority - int((now - prompt.arrival_s) / self._aging_s) if self._by_priority else 0
        if prompt.returns:
            return level, -1.0, 0
        overtaken_tokens, fair_tokens = prompt.overtaken_tokens, self._fair_tokens
        if overtaken_tokens > fair_tokens or fair_tokens <= 0:
            return level, 0.0, prompt.number
        patience = 1.0 - overtaken_tokens / fair_tokens
        if prompt.has_begun and prompt.has_blocks:
            return level, prompt.num_tokens * self._begun_weight * patience, prompt.number
        return level, prompt.num_tokens * patience, prompt.number

    def may_overtake(self, request: R) -> bool:
        """Return whether the bound of the oldest queued prompt allows it."""
        mine = self._prompts[request]
        if mine.returns:
            return True
        queued = (
            p for p in self._prompts.values() if not p.has_blocks and p.priority == mine.priority and not p.returns
        )
        oldest = next(queued)
        return oldest is mine or self._can_be_overtaken(oldest, mine.num_tokens)

    def begins_soon(self, request: R, now: float) -> bool:
        """Return whether the prompts with blocks that go before it are less than ``LOOKAHEAD_STEPS`` full steps."""
        rank = self._rank(self._prompts[request], now)
        ahead = sum(p.num_tokens for p in self._holding.values() if p.is_ready and self._rank(p, now) <= rank)
        return ahead < LOOKAHEAD_STEPS * self._step_tokens


def prefill_order(config: SchedulerConfig) -> PrefillOrder[R]:
    """Return the order that ``config`` names."""
    match config.prefill_order:
        case "fifo":
            return Fifo(config)
        case "shortest_first":
            return ShortestFirst(config)
