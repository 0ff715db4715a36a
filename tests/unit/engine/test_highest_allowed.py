"""The highest logit that a grammar allows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from kvrelay.engine.highest_allowed import highest_allowed, highest_allowed_by_numpy
from kvrelay.engine.native.library import NativeLibrary
from kvrelay.protocol.token_rules import mask_words

Float32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]


def words_of(allowed: npt.NDArray[np.bool_]) -> Words:
    """Return the mask whose bits are ``allowed`` [vocab_size]; the bits behind them are set too."""
    bits = np.ones(mask_words(len(allowed)) * 32, np.bool_)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.int32)


def cases(vocab_size: int) -> Iterator[tuple[Float32, npt.NDArray[np.bool_]]]:
    """Yield logits, of which many are equal or minus infinity, and what is allowed of them: nothing to all."""
    rng = np.random.default_rng(vocab_size)
    for share in (0.0, 0.02, 0.5, 1.0):
        for share_possible in (0.0, 0.7, 1.0):
            row = rng.integers(-3, 4, vocab_size).astype(np.float32)
            row[rng.random(vocab_size) >= share_possible] = -np.inf
            yield row, rng.random(vocab_size) < share


def expected(row: Float32, allowed: npt.NDArray[np.bool_]) -> int | None:
    tokens = [token for token in range(len(row)) if allowed[token] and row[token] > -np.inf]
    return max(tokens, key=lambda token: (row[token], -token), default=None)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 1000])
def test_it_is_the_first_of_the_highest(vocab_size: int) -> None:
    for row, allowed in cases(vocab_size):
        words = words_of(allowed)
        assert highest_allowed(row, words) == highest_allowed_by_numpy(row, words) == expected(row, allowed)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 1000])
def test_each_instruction_set_finds_it(library: NativeLibrary, vocab_size: int) -> None:
    for row, allowed in cases(vocab_size):
        words = words_of(allowed)
        found = library.highest_allowed(row.ctypes.data, words.ctypes.data, vocab_size)
        assert found == (-1 if (token := expected(row, allowed)) is None else token)
