from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from engine_runs import sequence

from kvrelay.engine.sampler import sample, uniform, verify
from kvrelay.grammar.constraint import AllowedTokens
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed
from kvrelay.protocol.request import Sequence
from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask

GOLDEN_UNIFORM = 0.5351388454566608
LOGITS = np.array([2.0, 1.0, 0.5, 1.5, -3.0, 0.0], np.float32)


def sampled_rows(rows: np.ndarray, sequences: list[Sequence]) -> list[SampledTokens]:
    """Sample rows none of which fails."""
    outcomes = sample(rows, sequences)
    sampled = [outcome for outcome in outcomes if isinstance(outcome, SampledTokens)]
    assert len(sampled) == len(outcomes)
    return sampled


def draws(row: np.ndarray, count: int = 4000, **sampling: Any) -> Counter[int]:
    """Sample ``row`` with ``count`` seeds."""
    sequences = [sequence([5, 5], seed=seed, **sampling) for seed in range(count)]
    rows = np.broadcast_to(row, (count, len(row)))
    return Counter(sampled.token_ids[0] for sampled in sampled_rows(rows, sequences))


def one(row: np.ndarray, one_sequence: Sequence) -> int:
    return sampled_rows(row[None], [one_sequence])[0].token_ids[0]


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row.astype(np.float64) - row.max())
    shares: np.ndarray = weights / weights.sum()
    return shares


def expected(row: np.ndarray, keep: list[int], temperature: float = 1.0) -> np.ndarray:
    """Brute force: the distribution over ``keep`` only."""
    masked = np.full(len(row), -np.inf)
    masked[keep] = row[keep] / temperature
    return softmax(masked)


def assert_distributed(found: Counter[int], wanted: np.ndarray) -> None:
    total = found.total()
    assert {token for token in found if wanted[token] == 0} == set()
    for token, probability in enumerate(wanted):
        spread = 5 * math.sqrt(probability * (1 - probability) / total)
        assert abs(found[token] / total - probability) <= spread + 1e-9


def test_temperature_zero_takes_the_highest_logit() -> None:
    assert one(LOGITS, sequence([1])) == 0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_scales_the_logits(temperature: float) -> None:
    assert_distributed(draws(LOGITS, temperature=temperature), expected(LOGITS, [0, 1, 2, 3, 4, 5], temperature))


def test_top_k_keeps_the_k_highest() -> None:
    assert_distributed(draws(LOGITS, temperature=1.0, top_k=2), expected(LOGITS, [0, 3]))


@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.6, 0.7, 0.9, 0.99])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float) -> None:
    order = np.argsort(-LOGITS)
    reached = np.cumsum(softmax(LOGITS)[order])
    keep = order[: int(np.argmax(reached >= top_p)) + 1].tolist()
    assert_distributed(draws(LOGITS, temperature=1.0, top_p=top_p), expected(LOGITS, keep))


def test_top_p_counts_what_top_k_left() -> None:
    # of the two that top_k leaves, the first has 0.62 of the weight
    assert_distributed(draws(LOGITS, temperature=1.0, top_k=2, top_p=0.6), expected(LOGITS, [0]))


def test_top_p_in_a_large_vocabulary_is_the_plain_definition() -> None:
    row = np.random.default_rng(3).normal(0, 3, 5000).astype(np.float32)
    order = np.argsort(-row)
    keep = set(order[: int(np.argmax(np.cumsum(softmax(row)[order]) >= 0.8)) + 1].tolist())
    found = set(draws(row, 3000, temperature=1.0, top_p=0.8))
    assert found <= keep and len(found) > len(keep) / 3


def test_min_p_is_relative_to_the_highest() -> None:
    keep = [token for token, share in enumerate(np.exp(LOGITS - LOGITS.max())) if share >= 0.3]
    assert keep == [0, 1, 3]
    assert_distributed(draws(LOGITS, temperature=1.0, min_p=0.3), expected(LOGITS, keep))


def test_repetition_penalty_counts_prompt_and_output() -> None:
    row = np.array([2.0, 1.9, 1.8, -0.1, -0.12], np.float32)
    seen = sequence([0], repetition_penalty=2.0)
    seen.token_ids.append(1)
    assert one(row, seen) == 2
    only_negative = np.array([-1.0, -1.5], np.float32)
    assert one(only_negative, sequence([0], repetition_penalty=2.0)) == 1


def test_presence_penalty_counts_output_once() -> None:
    row = np.array([2.0, 1.9], np.float32)
    assert one(row, sequence([0, 0], presence_penalty=0.2)) == 0
    seen = sequence([0], presence_penalty=0.2)
    seen.token_ids += [0]
    assert one(row, seen) == 1
    seen = sequence([0], presence_penalty=0.09)
    seen.token_ids += [0, 0, 0]
    assert one(row, seen) == 0


def test_frequency_penalty_counts_each_output() -> None:
    row = np.array([2.0, 1.9], np.float32)
    seen = sequence([0], frequency_penalty=0.04)
    seen.token_ids += [0, 0]
    assert one(row, seen) == 0
    seen.token_ids += [0]
    assert one(row, seen) == 1


def test_logit_bias_is_added() -> None:
    assert one(LOGITS, sequence([1], logit_bias={4: 6.0})) == 4
    assert draws(LOGITS, 300, temperature=1.0, logit_bias={4: 100.0}) == Counter({4: 300})


def test_bad_words_are_not_completed() -> None:
    """After a prompt of 5 and an output of 0 3, 0 may not follow at all, 1 not after 3, and 4 not after 0 3."""
    rules = TokenRules(bad_words=BadWords.of([[0], [3, 1], [5, 0, 2], [0, 3, 4], [5, 0, 3, 5]]))
    asked = [sequence([5], seed=seed, temperature=1.0, token_rules=rules) for seed in range(4000)]
    for one_asked in asked:
        one_asked.token_ids += [0, 3]
    found = Counter(sampled.token_ids[0] for sampled in sampled_rows(np.tile(LOGITS, (4000, 1)), asked))
    assert_distributed(found, expected(LOGITS, [2, 3, 5]))


def test_bad_words_after_drafts_that_are_right() -> None:
    """Guesses are compared with what comes when the words before them are in the output."""
    asked = sequence([1], token_rules=TokenRules(bad_words=BadWords.of([[0, 0, 0]])))
    rows = np.tile(LOGITS, (4, 1))
    assert verify(rows, asked, (0, 0, 3)) == SampledTokens([0, 0, 3, 0], [])
    assert verify(rows, asked, (0, 0, 0)) == SampledTokens([0, 0, 3], [])


def test_only_allowed_tokens_are_drawn_and_chosen() -> None:
    allowed = [1, 4, 5]
    asked = [sequence([5], seed=seed, temperature=1.0) for seed in range(4000)]
    greedy, biased = sequence([5]), sequence([5], logit_bias={4: 6.0})
    for one_asked in (*asked, greedy, biased):
        one_asked.constraint = AllowedTokens(token_mask(allowed, len(LOGITS)), len(LOGITS))
    found = Counter(sampled.token_ids[0] for sampled in sampled_rows(np.tile(LOGITS, (4000, 1)), asked))
    assert_distributed(found, expected(LOGITS, allowed))
    assert (one(LOGITS, greedy), one(LOGITS, biased)) == (1, 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_allowed_token_is_the_error_of_its_sequence(temperature: float) -> None:
    asked = sequence([5], temperature=temperature)
    asked.constraint = AllowedTokens(token_mask([], len(LOGITS)), len(LOGITS))
    [failed] = sample(LOGITS[None], [asked])
    assert isinstance(failed, SequenceFailed)
    assert failed.invalid


def test_min_tokens_masks_eos_and_stop_tokens_until_reached() -> None:
    waiting = sequence([1], min_tokens=1, eos_token_ids=[0], stop_token_ids=[3], ignore_eos=False)
    assert one(LOGITS, waiting) == 1
    waiting.token_ids.append(1)
    assert one(LOGITS, waiting) == 0


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    alone = [one(LOGITS, sequence([1, 2], seed=seed, temperature=1.0)) for seed in range(50)]
    sequences = [sequence([7, 8], seed=seed, temperature=1.0) for seed in reversed(range(50))]
    batched = sampled_rows(np.tile(LOGITS, (50, 1)), sequences)
    assert [sampled.token_ids[0] for sampled in reversed(batched)] == alone
    longer = [one(LOGITS, sequence([1, 2, 3], seed=seed, temperature=1.0)) for seed in range(50)]
    assert longer != alone


def test_uniform_is_a_fixed_function() -> None:
    # golden: another value would change every seeded answer ever given
    assert uniform(1234, 17) == GOLDEN_UNIFORM
    assert uniform(-1, 0) == uniform((1 << 64) - 1, 0)
    values = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert min(values) >= 0 and max(values) < 1 and len(set(values)) == len(values)
    assert abs(np.mean(values) - 0.5) < 0.03


def test_a_draw_never_gives_a_token_without_weight() -> None:
    row = np.array([1.0, 1.0, -200.0, -300.0], np.float32)
    found = draws(row, 2000, temperature=0.1)
    assert set(found) == {0, 1}


def test_nearly_equal_logits_give_the_same_draw() -> None:
    rng = np.random.default_rng(1)
    row = rng.normal(0, 1, 500).astype(np.float32)
    nudged = row + rng.normal(0, 1e-6, 500).astype(np.float32)
    assert draws(row, 500, temperature=1.0) == draws(nudged.astype(np.float32), 500, temperature=1.0)


def test_logprobs_are_of_the_raw_logits() -> None:
    asked = sequence([1], temperature=0.5, seed=3, num_logprobs=3, logit_bias={2: 50.0}, repetition_penalty=1.5)
    sampled = sampled_rows(LOGITS[None], [asked])[0]
    wanted = np.log(softmax(LOGITS))
    assert sampled.token_ids == [2]
    (logprobs,) = sampled.logprobs
    assert logprobs.logprob == pytest.approx(wanted[2], abs=1e-6)
    assert logprobs.top_token_ids == [0, 3, 1]
    assert logprobs.top_logprobs == pytest.approx(wanted[[0, 3, 1]], abs=1e-6)


def test_num_logprobs_zero_reports_the_token_alone_and_none_nothing() -> None:
    both = sampled_rows(np.tile(LOGITS, (2, 1)), [sequence([1], num_logprobs=0), sequence([1])])
    assert both[0].logprobs[0].top_token_ids == [] and both[0].logprobs[0].logprob < 0
    assert both[1].logprobs == []


def test_equal_logprobs_are_reported_in_token_order() -> None:
    asked = sequence([1], num_logprobs=3)
    tied = np.array([0.0, 1.0, 1.0, 1.0, 1.0], np.float32)
    assert sampled_rows(tied[None], [asked])[0].logprobs[0].top_token_ids == [1, 2, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_the_error_of_their_row_alone(bad: float, temperature: float) -> None:
    rows = np.tile(LOGITS, (3, 1))
    rows[1, 3] = bad
    asked = [sequence([1], name, temperature=temperature, num_logprobs=2) for name in ("first", "second", "third")]
    asked[1].token_ids += [2, 2]
    outcomes = sample(rows, asked)
    assert outcomes[1] == SequenceFailed("the model's logits are not finite at output position 2")
    assert [outcomes[0], outcomes[2]] == sample(rows[[0, 2]], [asked[0], asked[2]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_of_minus_infinity_is_a_token_that_is_never_sampled(temperature: float) -> None:
    row = np.array([[-np.inf, 1.0, -np.inf, 2.0, -np.inf, 0.0]], np.float32)
    drawn = {
        sampled_rows(row, [sequence([1], seed=seed, temperature=temperature, repetition_penalty=1.5)])[0].token_ids[0]
        for seed in range(40)
    }
    assert drawn <= {1, 3, 5}
    [outcome] = sampled_rows(row, [sequence([1], num_logprobs=6, temperature=temperature)])
    assert outcome.logprobs[0].top_logprobs[3:] == [-np.inf] * 3


def test_a_row_of_minus_infinity_alone_is_an_error() -> None:
    [outcome] = sample(np.full((1, 6), -np.inf, np.float32), [sequence([1])])
    assert isinstance(outcome, SequenceFailed) and "not finite" in outcome.reason


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parameters_that_leave_no_token_are_the_error_of_their_sequence(temperature: float) -> None:
    rows = np.tile(LOGITS, (2, 1))
    nothing = sequence([1], min_tokens=3, stop_token_ids=list(range(6)), temperature=temperature)
    outcomes = sample(rows, [nothing, sequence([1])])
    assert outcomes[0] == SequenceFailed(
        "output position 0 cannot be sampled: the sampling parameters leave no token to choose", invalid=True
    )
    assert outcomes[1] == sample(rows[1:], [sequence([1])])[0]


@pytest.mark.parametrize(
    "params", [{"logit_bias": {6: 1.0}}, {"min_tokens": 2, "stop_token_ids": [99]}, {"min_p": 2.0, "temperature": 1.0}]
)
def test_whatever_sampling_raises_is_the_error_of_its_sequence(params: dict[str, Any]) -> None:
    rows = np.tile(LOGITS, (2, 1))
    outcomes = sample(rows, [sequence([1], "bad", **params), sequence([1])])
    assert isinstance(outcomes[0], SequenceFailed) and "output position 0" in outcomes[0].reason
    assert outcomes[1] == sample(rows[1:], [sequence([1])])[0]


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1e-300, 1.0])
@pytest.mark.parametrize("penalty", [5e-324, 1e-50, 1e-38, 1.0, 100.0])
def test_extreme_temperatures_and_penalties_overflow_nothing(temperature: float, penalty: float) -> None:
    rows = np.stack([LOGITS, LOGITS * np.float32(1e4), np.zeros(6, np.float32)])
    asked = [sequence([1, 3], temperature=temperature, repetition_penalty=penalty, top_p=0.9) for _ in rows]
    for outcome in sample(rows, asked):
        assert isinstance(outcome, SampledTokens) and 0 <= outcome.token_ids[0] < 6


def test_a_guess_after_which_nothing_is_finite_changes_nothing_about_the_tokens_before_it() -> None:
    """The next step begins where the logits are bad, and fails as a plain one does."""
    asked, rows = sequence([1]), np.tile(LOGITS, (3, 1))
    best = int(LOGITS.argmax())
    rows[2] = np.nan
    assert verify(rows, asked, (best, best)) == SampledTokens([best, best], [])
    assert verify(rows, asked, ((best + 1) % 6, best)) == SampledTokens([best], [])
    rows[1] = np.nan
    assert verify(rows, asked, ((best + 1) % 6, best)) == SampledTokens([best], [])
    rows[0] = np.nan
    assert isinstance(verify(rows, asked, (best, best)), SequenceFailed)


def test_nothing_to_sample_is_fine() -> None:
    assert sample(np.empty((0, 6), np.float32), []) == []
