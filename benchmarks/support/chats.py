"""Chats of several turns: each turn sends the whole history, so prefixes grow.

All begin with one system prompt of 1,000 tokens. The first message is long (something is pasted in: median 800 tokens),
the others are not (median 300). An answer ends by itself, after 180 tokens on average, of the 1,024 that clients allow.
"""

from __future__ import annotations

import random

NUM_CHATS, NUM_AT_ONCE = 78, 39
MIN_TURNS, MAX_TURNS = 2, 8
SYSTEM_TOKENS = 1_000
FIRST_MEDIAN, NEXT_MEDIAN, MESSAGE_SIGMA, MESSAGE_MAX = 800, 300, 0.8, 8_000
ANSWER_MEAN, MAX_TOKENS = 180, 1_024
VOCAB_SIZE, EOS = 384, 2


def chats(seed: int = 0) -> list[list[list[int]]]:
    """Return what the users say: for each chat the tokens of each message, the system prompt before the first."""
    rng = random.Random(seed)
    system = tokens(rng, SYSTEM_TOKENS)
    made = []
    for _ in range(NUM_CHATS):
        medians = [FIRST_MEDIAN, *[NEXT_MEDIAN] * (rng.randint(MIN_TURNS, MAX_TURNS) - 1)]
        first, *others = [tokens(rng, message_length(rng, median)) for median in medians]
        made.append([system + first, *others])
    return made


def message_length(rng: random.Random, median: int) -> int:
    return min(MESSAGE_MAX, max(1, round(median * rng.lognormvariate(0.0, MESSAGE_SIGMA))))


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(EOS + 1, VOCAB_SIZE) for _ in range(count)]
