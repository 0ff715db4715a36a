"""Loads for a prefill node. Lengths in tokens, times in seconds of the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from support.chats import NUM_AT_ONCE, chats, tokens

NUM_PROMPTS = 250
UTILIZATION = 0.85
TOKEN_S = 0.107e-3
"""What a prompt token costs in full steps of ``cost_model``."""
SHORTEST, LONGEST = 64, 8_192
USUAL, LONG_FACTOR, LONG_SHARE = 400, 50, 0.01
ANSWER_TOKENS = 32
MIXED_PROMPTS, MIXED_AT_ONCE, MIXED_SHORTEST, MIXED_LONGEST = 96, 16, 32, 1_024
"""For a mixed node with a small model on a CPU."""


@dataclass(frozen=True)
class Client:
    """Sends ``messages``, each with the whole history before it, the first at ``start_s`` or when there is room."""

    start_s: float
    messages: Sequence[list[int]]


@dataclass(frozen=True)
class Load:
    """``clients``, at most ``num_at_once`` of them active; ``max_tokens`` of each answer, None: it ends by itself."""

    clients: Sequence[Client]
    num_at_once: int
    max_tokens: int | None = None


def chat_load(seed: int) -> Load:
    """Multi-turn chats, a fixed number at once: short follow-up turns among long first prompts."""
    return Load([Client(0.0, messages) for messages in chats(seed)], NUM_AT_ONCE)


def random_load(seed: int) -> Load:
    """Single prompts of log-uniform length at random times."""
    rng = random.Random(seed)
    lengths = [round(SHORTEST * (LONGEST / SHORTEST) ** rng.random()) for _ in range(NUM_PROMPTS)]
    return _open_load(rng, lengths)


def mixed_load(seed: int) -> Load:
    """Single prompts of log-uniform length, a fixed number at once, in the way of ``vllm bench serve``."""
    rng = random.Random(seed)
    lengths = [round(MIXED_SHORTEST * (MIXED_LONGEST / MIXED_SHORTEST) ** rng.random()) for _ in range(MIXED_PROMPTS)]
    return Load([Client(0.0, [tokens(rng, length)]) for length in lengths], MIXED_AT_ONCE, ANSWER_TOKENS)


def heavy_tail_load(seed: int) -> Load:
    """Single prompts of about one length at random times, and one in a hundred 50 times as long."""
    rng = random.Random(seed)
    lengths = [round(USUAL * rng.uniform(0.5, 1.5)) for _ in range(2 * NUM_PROMPTS)]
    for place in rng.sample(range(len(lengths)), round(LONG_SHARE * len(lengths))):
        lengths[place] = USUAL * LONG_FACTOR
    return _open_load(rng, lengths)


def _open_load(rng: random.Random, lengths: Sequence[int]) -> Load:
    """Return a client for each length, at random times that keep the node busy for a share of ``UTILIZATION``."""
    interval_s = sum(lengths) / len(lengths) * TOKEN_S / UTILIZATION
    clients, now = [], 0.0
    for length in lengths:
        now += rng.expovariate(1.0 / interval_s)
        clients.append(Client(now, [tokens(rng, length)]))
    return Load(clients, len(clients), ANSWER_TOKENS)


LOADS: dict[str, Callable[[int], Load]] = {"chats": chat_load, "random": random_load, "heavy-tail": heavy_tail_load}
