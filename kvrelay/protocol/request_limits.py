"""Checks of a request on a node, before any work is done for it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from kvrelay.errors import InvalidRequestError, KVRelayError, PromptTooLongError
from kvrelay.protocol.request import RequestSpec
from kvrelay.protocol.token_rules import TokenRules, mask_words


class RequestLimits(NamedTuple):
    """Limits of the node's model: token ids from 0 to ``vocab_size - 1``, and ``max_model_len`` tokens in total."""

    vocab_size: int
    max_model_len: int

    def error(self, spec: RequestSpec) -> KVRelayError | None:
        """Return the error of ``spec``, or None. Reads each token once."""
        if not spec.prompt_token_ids:
            return InvalidRequestError("prompt: has no tokens", param="prompt")
        return self._unknown_token(spec) or self._wrong_mask(spec.sampling.token_rules) or self._length(spec)

    def _unknown_token(self, spec: RequestSpec) -> InvalidRequestError | None:
        params = spec.sampling
        fields: dict[str, Collection[int]] = {
            "prompt": spec.prompt_token_ids,
            "output_token_ids": spec.output_token_ids,
            "logit_bias": params.logit_bias,
            "stop_token_ids": params.stop_token_ids,
            "eos_token_ids": params.eos_token_ids,
        }
        rules = params.token_rules
        if rules is not None and rules.bad_words is not None:
            fields["bad_words"] = list(rules.bad_words.token_ids())
        for name, token_ids in fields.items():
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
                token_id = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
                return unknown_token(name, token_id, self.vocab_size)
        return None

    def _wrong_mask(self, rules: TokenRules | None) -> InvalidRequestError | None:
        if rules is None or rules.allowed is None or len(rules.allowed) == 4 * mask_words(self.vocab_size):
            return None
        reason = f"a mask of {len(rules.allowed)} bytes is not one of a vocabulary of {self.vocab_size}"
        return InvalidRequestError(f"allowed_token_ids: {reason}", param="allowed_token_ids")

    def _length(self, spec: RequestSpec) -> PromptTooLongError | None:
        num_prompt, num_output = len(spec.prompt_token_ids), max(spec.sampling.max_tokens, len(spec.output_token_ids))
        if num_prompt + num_output <= self.max_model_len:
            return None
        return PromptTooLongError(
            f"a prompt of {num_prompt} and an output of up to {num_output} tokens exceed the model's length of "
            f"{self.max_model_len}",
            param="prompt",
        )


def unknown_token(param: str, token_id: int, vocab_size: int) -> InvalidRequestError:
    """Return the error for a ``token_id`` in field ``param`` that the model does not have."""
    return InvalidRequestError(
        f"{param}: {token_id} is not a token id of this model, whose vocabulary has {vocab_size}", param=param
    )
