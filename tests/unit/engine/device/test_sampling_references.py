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
from steps import Shape

from kvrelay.engine.device.torch_framework import TorchFramework
from kvrelay.engine.device.torch_operations import TorchOperations


@pytest.fixture
def references() -> TorchOperations:
    shape = Shape()
    return TorchOperations(TorchFramework("cpu"), shape.head_shape(), shape.limits())


@pytest.mark.parametrize("vocab_size", [50, 384, 2000])
def test_tokens_and_logprobs_are_those_of_the_host(references: TorchOperations, vocab_size: int) -> None:
    check_tokens_and_logprobs(references, vocab_size, seed=vocab_size)


def test_drafts(references: TorchOperations) -> None:
    check_drafts(references, 60)


def test_masks(references: TorchOperations) -> None:
    check_masks(references, 100)


def test_a_logit_that_is_not_finite(references: TorchOperations) -> None:
    check_non_finite(references)


def test_parameters_that_leave_no_token(references: TorchOperations) -> None:
    check_none_left(references)


@pytest.mark.parametrize("vocab_size", [50, 384, 2000])
def test_logprobs_of_prompts_are_those_of_the_host(references: TorchOperations, vocab_size: int) -> None:
    check_prompt_logprobs(references, vocab_size)
