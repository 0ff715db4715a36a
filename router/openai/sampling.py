"""Converts a request's fields to SamplingParams: fills in defaults and checks the model's bounds."""

from __future__ import annotations

import msgspec

from kvrelay.errors import InvalidRequestError, PromptTooLongError
from kvrelay.protocol.request import Grammar, SamplingParams
from kvrelay.protocol.request_limits import unknown_token
from kvrelay.protocol.token_rules import TokenRules
from router.model import ServedModel
from router.openai.field_types import INT64
from router.openai.prompt_logprobs import check_num_prompt_logprobs, num_prompt_logprobs
from router.openai.schemas import ChatCompletionRequest, CompletionRequest, GenerationFields
from router.openai.structured import Structure
from router.text.output_text import NO_IDS, TextOptions
from router.text.stop import NO_STOPS, StopStrings

_LONG_TEXT_CHARS = 64 << 10
"""Shorter texts are tokenized faster than the longest token of a vocabulary is found."""


class RequestSampling:
    """The sampling parameters of one request. Parameters that all its prompts share are created once.

    Raises InvalidRequestError if a token id is not in the vocabulary.
    """

    def __init__(
        self,
        request: GenerationFields,
        model: ServedModel,
        max_model_len: int,
        structure: Structure | None = None,
        rules: TokenRules | None = None,
    ) -> None:
        self._request = request
        self._max_model_len = max_model_len
        self._common = _common_params(request, model, structure, rules)
        self._num_prompt_tokens = 0

    def of(self, num_prompt_tokens: int, seed: int = 0) -> SamplingParams:
        """Return the parameters for one prompt, with ``seed`` as its own. Call it once for each choice.

        Raises PromptTooLongError if the model has no room for output, InvalidRequestError if ``min_tokens`` is more
        than what may be generated, or if the prompts so far have too many log probabilities.
        """
        if self._common.num_prompt_logprobs is not None:
            self._num_prompt_tokens += num_prompt_tokens
            check_num_prompt_logprobs(self._num_prompt_tokens, self._common.num_prompt_logprobs, self._request)
        max_tokens, min_tokens = self._max_tokens(num_prompt_tokens), self._common.min_tokens
        if min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens: {min_tokens} is more than may be generated, which is {max_tokens}", param="min_tokens"
            )
        return msgspec.structs.replace(self._common, max_tokens=max_tokens, seed=seed & INT64)

    def _max_tokens(self, num_prompt_tokens: int) -> int:
        """Return the maximum number of tokens to generate: the requested one, limited by the model's length.

        Clients ask for their own upper limit, so more than there is room for is no fault, as long as one token fits.
        """
        asked = _asked_tokens(self._request)
        room = self._max_model_len - num_prompt_tokens
        if room < (0 if asked == 0 else 1):
            field = "messages" if isinstance(self._request, ChatCompletionRequest) else "prompt"
            raise PromptTooLongError(
                too_long(num_prompt_tokens, max(1, asked or 0), self._max_model_len, field), param=field
            )
        return room if asked is None else min(asked, room)


def _common_params(
    request: GenerationFields, model: ServedModel, structure: Structure | None, rules: TokenRules | None
) -> SamplingParams:
    """Return the parameters that all prompts share."""
    stop_token_ids, logit_bias = request.stop_token_ids or [], request.logit_bias or {}
    check_token_ids(stop_token_ids, model.vocab_size, "stop_token_ids")
    check_token_ids(logit_bias, model.vocab_size, "logit_bias")
    top_p = _chosen(request, model, "top_p", 1.0)
    return SamplingParams(
        max_tokens=0,
        seed=0,
        min_tokens=request.min_tokens or 0,
        # top_p 0 leaves the most likely token only.
        temperature=_chosen(request, model, "temperature", 1.0) if top_p else 0.0,
        top_p=top_p or 1.0,
        top_k=max(0, int(_chosen(request, model, "top_k", 0))),
        min_p=_chosen(request, model, "min_p", 0.0),
        repetition_penalty=_chosen(request, model, "repetition_penalty", 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=logit_bias,
        eos_token_ids=list(model.eos_token_ids),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=num_logprobs(request),
        num_prompt_logprobs=num_prompt_logprobs(request),
        grammar=None if structure is None else _grammar(request, structure, model, rules),
        token_rules=rules,
    )


def _grammar(request: GenerationFields, structure: Structure, model: ServedModel, rules: TokenRules | None) -> Grammar:
    """Return the grammar of ``structure``. Raises InvalidRequestError for fields that contradict it."""
    if request.ignore_eos:
        raise InvalidRequestError(f"ignore_eos: not together with {structure.field}", param="ignore_eos")
    if request.min_tokens:
        raise InvalidRequestError(f"min_tokens: not together with {structure.field}", param="min_tokens")
    if not model.eos_token_ids and not request.stop_token_ids:
        reason = "the model has no token that ends a text; set stop_token_ids"
        raise InvalidRequestError(f"{structure.field}: {reason}", param=structure.field.partition(".")[0])
    ends = [*model.eos_token_ids, *(request.stop_token_ids or ())]
    if rules is not None and not any(map(rules.may_have, ends)):
        name = "bad_words" if rules.allowed is None else "allowed_token_ids"
        raise InvalidRequestError(f"{name}: leave no token to end the output of {structure.field}", param=name)
    return structure.grammar


def text_options(request: GenerationFields, shown_ids: frozenset[int] = NO_IDS) -> TextOptions:
    """Return the text options of the request. ``shown_ids``: special tokens that are shown in any case."""
    return TextOptions(
        stop=StopStrings(request.stop) if request.stop else NO_STOPS,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        min_tokens=request.min_tokens or 0,
        shown_ids=shown_ids,
    )


def num_logprobs(request: GenerationFields) -> int | None:
    """Return how many alternatives to report per token; None: no logprobs at all."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if isinstance(request, ChatCompletionRequest) and request.logprobs:
        return request.top_logprobs or 0
    return None


def truncated(prompt: list[int], request: GenerationFields, max_model_len: int) -> list[int]:
    """Return the tokens at the end of ``prompt`` that ``truncate_prompt_tokens`` keeps; -1 leaves room for one token.

    Raises InvalidRequestError if it is more than the model takes.
    """
    asked = request.truncate_prompt_tokens
    if asked is None:
        return prompt
    if asked > max_model_len:
        raise InvalidRequestError(
            f"truncate_prompt_tokens: {asked} is more than max_model_len, which is {max_model_len}",
            param="truncate_prompt_tokens",
        )
    return prompt[-(max_model_len - 1 if asked == -1 else asked) :]


def check_num_messages(messages: object, max_model_len: int, param: str = "messages") -> None:
    """Raise PromptTooLongError for more messages than ``max_model_len``, before any work per message."""
    if isinstance(messages, list) and len(messages) > max_model_len:
        raise PromptTooLongError(too_long(len(messages), 1, max_model_len, param, at_least=True), param=param)


def check_text_length(text: str, model: ServedModel, max_model_len: int, param: str) -> None:
    """Raise PromptTooLongError if ``text`` is certainly too long, without tokenizing it."""
    if (
        len(text) > max(max_model_len, _LONG_TEXT_CHARS)
        and (fewest := model.tokenizer.fewest_tokens(text)) > max_model_len
    ):
        raise PromptTooLongError(too_long(fewest, 1, max_model_len, param, at_least=True), param=param)


def check_token_ids(token_ids: list[int] | dict[int, float], vocab_size: int, param: str) -> None:
    """Raise InvalidRequestError if one of ``token_ids`` is not in the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        unknown = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise unknown_token(param, unknown, vocab_size)


def check_text_ids(token_ids: list[int], model: ServedModel, param: str) -> None:
    """Raise InvalidRequestError if the text in ``param``, tokenized, has a token that the model does not have.

    Tokenizers may know more tokens than the model has embeddings, for instance a padding token that was added later.
    """
    if token_ids and max(token_ids) >= model.vocab_size:
        unknown = next(token_id for token_id in token_ids if token_id >= model.vocab_size)
        [text] = model.tokenizer.tokens_of([unknown])
        raise InvalidRequestError(
            f"{param}: {text!r} is token {unknown} of the tokenizer, but the model's vocabulary has only "
            f"{model.vocab_size} tokens",
            param=param,
        )


def _asked_tokens(request: GenerationFields) -> int | None:
    """Return the requested limit; None: limited by the model's length only."""
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def too_long(
    num_prompt_tokens: int, num_output_tokens: int, max_model_len: int, prompt: str, *, at_least: bool = False
) -> str:
    """Return OpenAI's message, by which client libraries recognize that the prompt is too long."""
    requested = f"{'at least ' if at_least else ''}{num_prompt_tokens + num_output_tokens} tokens"
    return (
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {requested} "
        f"({num_prompt_tokens} in the {prompt}, {num_output_tokens} in the completion). "
        f"Please reduce the length of the {prompt} or completion."
    )


def _chosen(request: GenerationFields, model: ServedModel, name: str, default: float) -> float:
    """Return the client's value, else the model's (``generation_config.json``), else the API's."""
    value: float | None = getattr(request, name)
    return model.default_sampling.get(name, default) if value is None else value
