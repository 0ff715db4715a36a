from __future__ import annotations

import pytest
from sampling_checks import (
    check_drafts,
    check_masks,
    check_non_finite,
    check_none_left,
    check_prompt_logprobs,
    check_tokens_and_logprobs,
)
from steps import Shape, operations

from kvrelay.engine.device.kernels.sampling import SamplingTiling


@pytest.mark.parametrize("block", [64, 1024])
@pytest.mark.parametrize("vocab_size", [50, 384, 1000])
def test_tokens_and_logprobs_are_those_of_the_host(vocab_size: int, block: int) -> None:
    ours, _ = operations(Shape())
    ours.sampling_tiling = SamplingTiling(block=block)
    check_tokens_and_logprobs(ours, vocab_size, seed=vocab_size)


def test_drafts() -> None:
    check_drafts(operations(Shape())[0], 60)


@pytest.mark.parametrize("vocab_size", [50, 1000])
def test_masks(vocab_size: int) -> None:
    ours, _ = operations(Shape())
    ours.sampling_tiling = SamplingTiling(block=64)
    check_masks(ours, vocab_size)


def test_a_logit_that_is_not_finite() -> None:
    check_non_finite(operations(Shape())[0])


def test_parameters_that_leave_no_token() -> None:
    check_none_left(operations(Shape())[0])


@pytest.mark.parametrize("block", [64, 1024])
@pytest.mark.parametrize("vocab_size", [50, 384, 1000])
def test_logprobs_of_prompts_are_those_of_the_host(vocab_size: int, block: int) -> None:
    ours, _ = operations(Shape())
    ours.sampling_tiling = SamplingTiling(block=block)
    check_prompt_logprobs(ours, vocab_size)
