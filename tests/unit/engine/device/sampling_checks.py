"""Checks of sampling on a device against the host's sampler, for interpreted kernels and for references."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sampling_cases import KINDS, logits, sample_on, sequence, sequences
from support.ids import block_ids

from kvrelay.engine.device.operations import NONE_LEFT, NOT_FINITE
from kvrelay.engine.prompt_logprobs import PromptRows, logprobs_of
from kvrelay.engine.sampler import sample, sample_step
from kvrelay.engine.sequences import EngineSequence, ScheduledSequence
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome
from kvrelay.protocol.token_rules import mask_words


def scheduled(one: EngineSequence, drafts: tuple[int, ...] | None = None) -> ScheduledSequence:
    newest = one.num_tokens - 1
    return ScheduledSequence(one, newest, 1 + len(drafts or ()), True, newest, drafts)


def check_tokens_and_logprobs(operations: Any, vocab_size: int, seed: int, device: str = "cpu") -> None:
    made = sequences(vocab_size, 2 * len(KINDS), seed)
    values = logits(vocab_size, len(made), seed)
    sampled = sample_on(operations, device, [scheduled(one) for one in made], values)
    expected = [token_of(one) for one in sample(values, made)]
    assert sampled.tokens.tolist() == [one.token_ids[0] for one in expected]
    for row, one in enumerate(expected):
        for entry in one.logprobs:
            count = len(entry.top_token_ids)
            assert sampled.top_tokens[row, 1 : 1 + count].tolist() == entry.top_token_ids
            ours = sampled.logprobs[row, : 1 + count].tolist()
            np.testing.assert_allclose(ours, [entry.logprob, *entry.top_logprobs], atol=1e-4)


def check_drafts(operations: Any, vocab_size: int, device: str = "cpu") -> None:
    """A row for each draft samples what the host samples when the drafts before it were right."""
    made = sequences(vocab_size, len(KINDS), 5)
    values = logits(vocab_size, 3 * len(made), 6).reshape(len(made), 3, vocab_size)
    drafts = [tuple(token_of(sample(rows[:1], [one])[0]).token_ids) for rows, one in zip(values, made, strict=True)]
    batch = [scheduled(one, (*guess, 7)) for one, guess in zip(made, drafts, strict=True)]
    sampled = sample_on(operations, device, batch, values.reshape(-1, vocab_size))
    ours = sampled.tokens.view(-1, 3)[:, :2].tolist()
    expected = sample_step(values.reshape(-1, vocab_size), batch)
    assert ours == [token_of(one).token_ids[:2] for one in expected]


def check_non_finite(operations: Any, device: str = "cpu") -> None:
    """NaN and plus infinity spoil a row; minus infinity is a token that nobody gets."""
    made = sequences(50, 9, 1)
    values = logits(50, 9, 1)
    values[1, 7], values[2, 0], values[3], values[4, 49], values[5, 0] = np.nan, np.inf, -np.inf, -np.inf, np.nan
    values[6, 1:], values[7, :] = -np.inf, -np.inf
    values[8, 20], made[8] = np.inf, sequences(50, 12, 1)[11]
    expected = [
        outcome.token_ids[0] if isinstance(outcome, SampledTokens) else NOT_FINITE for outcome in sample(values, made)
    ]
    assert sample_on(operations, device, [scheduled(one) for one in made], values).tokens.tolist() == expected


def check_none_left(operations: Any, device: str = "cpu") -> None:
    banned = {"min_tokens": 50, "eos_token_ids": list(range(25)), "stop_token_ids": list(range(25, 50))}
    kinds: list[dict[str, Any]] = [banned, {**banned, "temperature": 1.0, "num_logprobs": 2}, {"temperature": 1.0}]
    made = [sequence([1, 2, 3], f"r{index}", **kind) for index, kind in enumerate(kinds)]
    for one in made:
        one.take_blocks(block_ids(0))
    values = logits(50, 3, 1)
    assert isinstance(sample(values, made)[0], SequenceFailed)
    tokens = sample_on(operations, device, [scheduled(one) for one in made], values).tokens.tolist()
    assert tokens[:2] == [NONE_LEFT] * 2 and tokens[2] >= 0


def token_of(outcome: SequenceOutcome) -> SampledTokens:
    assert isinstance(outcome, SampledTokens)
    return outcome


class EveryThird:
    """A constraint that allows every third token, from one on that depends on the place."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def allowed(self, num_output_tokens: int) -> npt.NDArray[np.bool_]:
        is_third: npt.NDArray[np.bool_] = (np.arange(self._vocab_size) + num_output_tokens) % 3 == 0
        return is_third

    def words(self, num_output_tokens: int) -> npt.NDArray[np.int32]:
        bits = np.zeros(mask_words(self._vocab_size) * 32, bool)
        bits[: self._vocab_size] = self.allowed(num_output_tokens)
        return np.packbits(bits, bitorder="little").view(np.int32)


def check_masks(operations: Any, vocab_size: int, device: str = "cpu") -> None:
    """Every other sequence of every kind has a grammar, with drafts and without."""
    made = sequences(vocab_size, 2 * len(KINDS), 7)
    for one in made[::2]:
        one.constraint = EveryThird(vocab_size)
    values = logits(vocab_size, 2 * len(made), 8).reshape(len(made), 2, vocab_size)
    drafts = [tuple(token_of(sample(rows[:1], [one])[0]).token_ids) for rows, one in zip(values, made, strict=True)]
    batch = [scheduled(one, guess) for one, guess in zip(made, drafts, strict=True)]
    sampled = sample_on(operations, device, batch, values.reshape(-1, vocab_size))
    expected = [token_of(one).token_ids for one in sample_step(values.reshape(-1, vocab_size), batch)]
    assert sampled.tokens.view(-1, 2).tolist() == expected
    assert all(
        (token + one.num_output_tokens) % 3 == 0 for one, (token, _) in zip(made[::2], expected[::2], strict=True)
    )


def check_prompt_logprobs(operations: Any, vocab_size: int, device: str = "cpu") -> None:
    """Ranks and log probabilities are those of the host; a row that is not finite has no rank."""
    import torch

    values = logits(vocab_size, 9, 3)
    values[2, 5] = values[2].max()  # a tie
    targets = [int(target) for target in np.random.default_rng(4).integers(0, vocab_size, 9)]
    targets[2] = 5
    for count in (0, 1, 5, 20):
        rows = PromptRows(0, np.arange(9), targets, 1, count)
        expected = logprobs_of(values, rows)
        on_device = torch.tensor(values, device=device), torch.tensor(targets, dtype=torch.int32, device=device)
        found = operations.prompt_logprobs(*on_device, count)
        width = 1 + count
        assert found.tokens.tolist() == np.frombuffer(expected.ranks, "<i4").tolist()
        tops = np.frombuffer(expected.token_ids, "<i4").reshape(9, width)
        assert found.top_tokens[:, 1:width].tolist() == tops[:, 1:].tolist()
        wanted = np.frombuffer(expected.logprobs, "<f8").reshape(9, width)
        np.testing.assert_allclose(found.logprobs[:, :width].tolist(), wanted, atol=1e-4)
    values[0, 7], values[1, 0], values[3], values[4, 1] = np.nan, np.inf, -np.inf, -np.inf
    found = operations.prompt_logprobs(torch.tensor(values, device=device), on_device[1], 1)
    assert [rank == NOT_FINITE for rank in found.tokens.tolist()] == [True, True, False, True] + [False] * 5
