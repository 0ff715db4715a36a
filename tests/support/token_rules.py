"""Rules for tokens that leave few, and what an output that keeps them has not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask


def few_tokens(vocab_size: int, step: int = 8) -> list[int]:
    """Return the tokens that ``strict_rules`` allow."""
    return list(range(4, vocab_size, step))


def bad_words(vocab_size: int, step: int = 8) -> list[list[int]]:
    """Return one token of those allowed, half of their pairs, and a triple of each other pair."""
    tokens = few_tokens(vocab_size, step)
    pairs = list(product(tokens[1:33], tokens[1:33]))
    return [[tokens[0]], *map(list, pairs[::2]), *([*pair, pair[0]] for pair in pairs[1::2])]


def strict_rules(vocab_size: int, step: int = 8) -> TokenRules:
    """Return rules that change most tokens of an output, whatever it is."""
    return TokenRules(token_mask(few_tokens(vocab_size, step), vocab_size), BadWords.of(bad_words(vocab_size, step)))


def broken_rule(output: Sequence[int], allowed: Sequence[int], words: Sequence[Sequence[int]]) -> str | None:
    """Return which rule ``output`` breaks, None if it keeps all: by comparison with all of them."""
    for token in output:
        if token not in allowed:
            return f"token {token} is not allowed"
    for word in words:
        if any(list(output[at : at + len(word)]) == list(word) for at in range(len(output))):
            return f"{word} is in the output"
    return None
