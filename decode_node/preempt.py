"""Who gives up its blocks when the pool runs dry. Only a request in RUNNING_DECODE is ever asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from decode_node.request import DecodeRequest
from kvrelay.config.cluster_config import SchedulerConfig

VictimOrder: TypeAlias = Callable[[Sequence[DecodeRequest]], list[DecodeRequest]]
"""Puts decoding requests, given in the order in which they began to decode here, into the order of sacrifice."""


def latest_first(decoding: Sequence[DecodeRequest]) -> list[DecodeRequest]:
    """From the back: who came last has lost least."""
    return list(reversed(decoding))


def shortest_output_first(decoding: Sequence[DecodeRequest]) -> list[DecodeRequest]:
    """SGLang's order: fewest output tokens first; of equals, the longest prompt, because it frees most."""
    return sorted(decoding, key=lambda request: (request.num_output_tokens, -request.num_prompt_tokens))


def least_urgent_first(order: VictimOrder) -> VictimOrder:
    """Return ``order`` within each priority, the least urgent priority (the highest number) before all others."""
    return lambda decoding: sorted(order(decoding), key=lambda request: -request.priority)


def victim_order(config: SchedulerConfig) -> VictimOrder:
    """Return the order that ``config`` names."""
    order = {"latest_first": latest_first, "shortest_output_first": shortest_output_first}[config.preemption_order]
    return least_urgent_first(order) if config.enable_priority_scheduling else order
