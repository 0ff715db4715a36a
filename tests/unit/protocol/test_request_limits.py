"""What a node checks of a request, whoever sent it."""

from __future__ import annotations

from typing import Any

import pytest
from support.machines import spec

from kvrelay.errors import InvalidRequestError, PromptTooLongError
from kvrelay.protocol.request_limits import RequestLimits
from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask

LIMITS = RequestLimits(vocab_size=100, max_model_len=20)


def test_a_request_within_the_limits_is_fine() -> None:
    sampling = {"logit_bias": {99: 1.0}, "stop_token_ids": [0], "eos_token_ids": [99, 1]}
    assert LIMITS.error(spec(prompt=[0, 99], max_tokens=18, output_token_ids=[99], sampling=sampling)) is None


@pytest.mark.parametrize("bad", [-1, 100, 1 << 32, -(1 << 63), (1 << 64) - 1])
@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("prompt", lambda bad: {"prompt": [1, bad, 2]}),
        ("output_token_ids", lambda bad: {"output_token_ids": [bad]}),
        ("logit_bias", lambda bad: {"sampling": {"logit_bias": {5: 1.0, bad: 1.0}}}),
        ("stop_token_ids", lambda bad: {"sampling": {"stop_token_ids": [5, bad]}}),
        ("bad_words", lambda bad: {"sampling": {"token_rules": TokenRules(bad_words=BadWords.of([[5], [6, bad, 7]]))}}),
        ("eos_token_ids", lambda bad: {"sampling": {"eos_token_ids": [bad]}}),
    ],
)
def test_a_token_that_the_model_does_not_have_is_named_with_its_field(param: str, options: Any, bad: int) -> None:
    error = LIMITS.error(spec(**{"prompt": [1, 2], **options(bad)}))
    assert isinstance(error, InvalidRequestError)
    assert error.param == param
    assert error.message == f"{param}: {bad} is not a token id of this model, whose vocabulary has 100"


@pytest.mark.parametrize("num_bytes", [0, 12, 20])
def test_a_mask_of_another_vocabulary_is_refused(num_bytes: int) -> None:
    def checked(mask: bytes) -> object:
        return LIMITS.error(spec(prompt=[1], sampling={"token_rules": TokenRules(mask)}))

    assert checked(token_mask([99], 100)) is None
    error = checked(bytes(num_bytes))
    assert isinstance(error, InvalidRequestError) and error.param == "allowed_token_ids"


def test_a_prompt_without_tokens_is_refused() -> None:
    error = LIMITS.error(spec(prompt=[]))
    assert isinstance(error, InvalidRequestError) and error.param == "prompt"


@pytest.mark.parametrize(("prompt", "output", "max_tokens"), [(10, 0, 11), (21, 0, 1), (10, 11, 5)])
def test_a_request_longer_than_the_model_is_refused(prompt: int, output: int, max_tokens: int) -> None:
    error = LIMITS.error(spec(prompt=prompt, max_tokens=max_tokens, output_token_ids=[1] * output))
    assert isinstance(error, PromptTooLongError) and "model's length of 20" in error.message
