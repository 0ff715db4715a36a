"""In which order decodes are preempted when the pool has no block. Only requests in RUNNING_DECODE are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from decode_node.request import DecodeRequest
from kvrelay.config.cluster_config import SchedulerConfig

VictimOrder: TypeAlias = Callable[[Sequence[DecodeRequest]], list[DecodeRequest]]
"""Sorts decoding requests, given in the order in which they began to decode on this node: first victim first."""


def latest_first(decoding: Sequence[DecodeRequest]) -> list[DecodeRequest]:
    """The last one first: it has the least computed here."""
    return list(reversed(decoding))


def shortest_output_first(decoding: Sequence[DecodeRequest]) -> list[DecodeRequest]:
    """SGLang's order: fewest output tokens first; of equals, the longest prompt, because it frees most blocks."""
    return sorted(decoding, key=lambda request: (request.num_output_tokens, -request.num_prompt_tokens))


def least_urgent_first(order: VictimOrder) -> VictimOrder:
    """Return ``order`` within each priority, the least urgent priority (the highest number) before all others."""
    return lambda decoding: sorted(order(decoding), key=lambda request: -request.priority)


def victim_order(config: SchedulerConfig) -> VictimOrder:
    """Return the order that ``config`` names."""
    order = {"latest_first": latest_first, "shortest_output_first": shortest_output_first}[config.preemption_order]
    return least_urgent_first(order) if config.enable_priority_scheduling else order
