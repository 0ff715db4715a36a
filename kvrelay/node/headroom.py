"""How much of the pool is kept free for requests that run, when a new one asks for blocks.

A policy gates admission only: nothing that owns its blocks is ever held up by it. All arithmetic ends in whole blocks,
rounded up, never negative.
"""

from __future__ import annotations

from collections.abc import Collection
from math import ceil
from typing import Protocol

from kvrelay.config.cluster_config import FixedBlocksConfig, NewTokenRatioConfig, SchedulerConfig, SGLangReserveConfig


class Growing(Protocol):
    """The part of a request that policies look at."""

    @property
    def max_tokens(self) -> int:
        """Output tokens it may have at most."""

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far."""

    @property
    def remaining_output_tokens(self) -> int:
        """Output tokens still to come at most."""


def _blocks(num_tokens: float, block_size: int) -> int:
    """Return the blocks for a share of tokens. A share like 70 * 0.1, which floats put just above 7, is 7."""
    return ceil(num_tokens / block_size - 1e-9)


class ReservePolicy(Protocol):
    """Called by the scheduler; ``running`` is every request that has blocks here and may still grow."""

    @property
    def level(self) -> float:
        """The current reserve ratio, or blocks per decode, for metrics."""

    def headroom_blocks(self, running: Collection[Growing]) -> int:
        """Return how many blocks must stay free for ``running`` when a newcomer is admitted."""

    def charge_blocks(self, newcomer: Growing) -> int:
        """Return how many blocks beyond its present tokens must be free to admit ``newcomer``."""

    def room_blocks(self, num_decodes: int) -> int:
        """Return how many more blocks than needed at once a preemption frees for the decodes that stay."""

    def step_scheduled(self) -> None:
        """Note that a step with something in it was scheduled."""

    def preempted(self, staying: Collection[Growing]) -> None:
        """Note that a preemption was needed; ``staying`` are the requests still decoding."""

    def idle(self) -> None:
        """Note that nothing runs or waits."""


class NoReserve:
    """Policy ``none``: the baseline. Admits whatever fits now."""

    level = 0.0

    def headroom_blocks(self, running: Collection[Growing]) -> int:
        return 0

    def charge_blocks(self, newcomer: Growing) -> int:
        return 0

    def room_blocks(self, num_decodes: int) -> int:
        return 0

    def step_scheduled(self) -> None:
        """Do nothing."""

    def preempted(self, staying: Collection[Growing]) -> None:
        """Do nothing."""

    def idle(self) -> None:
        """Do nothing."""


class NewTokenRatio(NoReserve):
    """FastDeploy #7444: each running request may still generate a share of what it is allowed to.

    ``reserved_tokens = min(remaining, clip) * ratio``. The share falls a little with each step, so that a pool that
    turns out large enough fills up, and rises to what was really generated when a preemption shows it was too low.
    """

    ROOM_BLOCKS = 16
    """After a preemption each decode is taken to generate this many blocks more than it has."""

    def __init__(self, config: NewTokenRatioConfig, block_size: int) -> None:
        self._config = config
        self._block_size = block_size
        self.level = config.init

    def headroom_blocks(self, running: Collection[Growing]) -> int:
        """Return the sum of the shares of ``running``, each in whole blocks."""
        clip, ratio, size = self._config.clip_max_new_tokens, self.level, self._block_size
        return sum(_blocks(min(request.remaining_output_tokens, clip) * ratio, size) for request in running)

    def step_scheduled(self) -> None:
        """Let the share fall by ``decay``, to ``min`` at the lowest."""
        self.level = max(self._config.min, self.level - self._config.decay)

    def preempted(self, staying: Collection[Growing]) -> None:
        """Set the share to what those that stay have generated, and some room, of what they may."""
        decoded = sum(request.num_output_tokens for request in staying)
        allowed = sum(request.max_tokens for request in staying)
        room = self.ROOM_BLOCKS * self._block_size * len(staying)
        self.level = min(self._config.init, (decoded + room) / (allowed + 1))

    def idle(self) -> None:
        """Start again from ``init``."""
        self.level = self._config.init


class FixedBlocks(NoReserve):
    """The same number of blocks for every running request: a little fewer at each step, reset by a preemption."""

    def __init__(self, config: FixedBlocksConfig) -> None:
        self._config = config
        self.level = float(config.blocks)

    def headroom_blocks(self, running: Collection[Growing]) -> int:
        """Return ``level``, rounded up, for each."""
        return ceil(self.level) * len(running)

    def step_scheduled(self) -> None:
        """Let the number fall by ``decay``, to ``min_blocks`` at the lowest."""
        self.level = max(float(self._config.min_blocks), self.level - self._config.decay)

    def preempted(self, staying: Collection[Growing]) -> None:
        """Start again from ``blocks``."""
        self.level = float(self._config.blocks)


class SGLangReserve(NoReserve):
    """SGLang's way (FastDeploy #6606): a newcomer is charged all it may generate, a decode a falling share of it."""

    def __init__(self, config: SGLangReserveConfig, block_size: int) -> None:
        self._config = config
        self._block_size = block_size
        self._min = config.init * config.min_factor
        self._decay = (config.init - self._min) / config.decay_steps
        self.level = config.init

    def headroom_blocks(self, running: Collection[Growing]) -> int:
        """Return the sum of the shares of ``running``, each in whole blocks."""
        clip, ratio, size = self._config.clip_max_new_tokens, self.level, self._block_size
        return sum(_blocks(min(request.remaining_output_tokens, clip) * ratio, size) for request in running)

    def charge_blocks(self, newcomer: Growing) -> int:
        """Return the blocks for all it may generate, clipped."""
        return ceil(min(newcomer.remaining_output_tokens, self._config.clip_max_new_tokens) / self._block_size)

    def room_blocks(self, num_decodes: int) -> int:
        """Return the blocks for ``retract_decode_steps`` more tokens of each decode."""
        return ceil(self._config.retract_decode_steps / self._block_size) * num_decodes

    def step_scheduled(self) -> None:
        """Let the share fall linearly, from ``init`` to its lowest within ``decay_steps``."""
        self.level = max(self._min, self.level - self._decay)

    def preempted(self, staying: Collection[Growing]) -> None:
        """Set the share to what those that stay will have generated after ``retract_decode_steps`` steps."""
        decoded = sum(request.num_output_tokens for request in staying)
        allowed = sum(request.max_tokens for request in staying)
        self.level = min(1.0, (decoded + self._config.retract_decode_steps * len(staying)) / (allowed + 1))

    def idle(self) -> None:
        """Start again from ``init``."""
        self.level = self._config.init


def reserve_policy(config: SchedulerConfig, block_size: int) -> ReservePolicy:
    """Return the policy that ``config`` names."""
    match config.reserve_policy:
        case "new_token_ratio":
            return NewTokenRatio(config.new_token_ratio, block_size)
        case "fixed_blocks":
            return FixedBlocks(config.fixed_blocks)
        case "sglang":
            return SGLangReserve(config.sglang, block_size)
        case "none":
            return NoReserve()
