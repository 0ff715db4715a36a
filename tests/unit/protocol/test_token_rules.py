"""What may come next by the rules of a request, compared with vLLM's comparison of every word with the output."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask


def by_comparison(words: Sequence[Sequence[int]], output: Sequence[int]) -> set[int]:
    """Return the last token of each word whose other tokens end ``output``."""
    found = set()
    for *before, last in words:
        if len(before) <= len(output) and list(output[len(output) - len(before) :]) == before:
            found.add(last)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_what_may_not_come_next(seed: int) -> None:
    rng = random.Random(seed)
    tokens = range(rng.randint(2, 5))
    words = [rng.choices(tokens, k=rng.randint(1, 4)) for _ in range(rng.randint(1, 12))]
    rules = BadWords.of(words)
    output: list[int] = []
    for _ in range(60):
        assert set(rules.next(output)) == by_comparison(words, output)
        output.append(rng.choice(tokens))


def test_the_same_word_twice_is_one() -> None:
    assert BadWords.of([[1, 2], [3], (1, 2), [3]]) == BadWords([3], {1: [[1, 2]]})


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 300])
def test_a_mask_has_the_bits_of_its_tokens(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    chosen = rng.sample(range(vocab_size), rng.randint(1, vocab_size))
    rules = TokenRules(token_mask(chosen, vocab_size))
    assert [token for token in range(vocab_size) if rules.may_have(token)] == sorted(chosen)


def test_a_word_of_one_token_is_not_allowed_at_all() -> None:
    rules = TokenRules(token_mask([1, 2], 4), BadWords.of([[1], [2, 2]]))
    assert [rules.may_have(token) for token in range(4)] == [False, False, True, False]
    assert TokenRules(bad_words=BadWords.of([[3]])).may_have(0)
