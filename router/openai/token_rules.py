"""The rules for tokens that a request asks for with ``allowed_token_ids`` and ``bad_words``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvrelay.errors import InvalidRequestError
from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask
from router.model import ServedModel
from router.openai.sampling import check_text_ids, check_token_ids
from router.openai.schemas import GenerationFields

MAX_BAD_WORD_TOKENS = 8192
"""Tokens of all bad words together: each message about the request has them."""


def token_rules_of(request: GenerationFields, model: ServedModel) -> TokenRules | None:
    """Return the rules that ``request`` asks for, None: there are none.

    Raises InvalidRequestError that names the field: a token is not in the vocabulary, there are too many, or none is
    left to begin with.
    """
    allowed, bad_words = request.allowed_token_ids, request.bad_words
    if allowed is None and not bad_words:
        return None
    if allowed is not None:
        check_token_ids(allowed, model.vocab_size, "allowed_token_ids")
    mask = None if allowed is None else token_mask(allowed, model.vocab_size)
    rules = TokenRules(mask, _tokenized(bad_words, model) if bad_words else None)
    if allowed is not None:
        _require_token(allowed, rules, request, model)
    return rules


def _require_token(allowed: list[int], rules: TokenRules, request: GenerationFields, model: ServedModel) -> None:
    """Raise InvalidRequestError if none of ``allowed`` may come first."""
    left = set(allowed).difference(rules.bad_words.always if rules.bad_words is not None else ())
    if not left:
        raise InvalidRequestError("bad_words: leave none of allowed_token_ids", param="bad_words")
    if request.min_tokens and left.issubset([*model.eos_token_ids, *(request.stop_token_ids or ())]):
        reason = "allowed_token_ids has only tokens that end the output"
        raise InvalidRequestError(f"min_tokens: {reason}", param="min_tokens")


def _tokenized(words: Sequence[str], model: ServedModel) -> BadWords:
    """Return the token sequences of ``words``. Raises InvalidRequestError."""
    sequences: list[list[int]] = []
    num_tokens = 0
    for word in words:
        for text in _spellings(word):
            token_ids = model.tokenizer.encode(text, add_special_tokens=False)
            check_text_ids(token_ids, model, "bad_words")
            if token_ids:
                sequences.append(token_ids)
                num_tokens += len(token_ids)
        if num_tokens > MAX_BAD_WORD_TOKENS:
            reason = f"are more than {MAX_BAD_WORD_TOKENS} tokens, with and without a blank before each"
            raise InvalidRequestError(f"bad_words: {reason}", param="bad_words")
    return BadWords.of(sequences)


def _spellings(word: str) -> Iterator[str]:
    """Yield ``word`` as it is at the beginning of a text and after a blank; blanks alone as they are."""
    bare = word.lstrip()
    if not bare:
        yield word
        return
    yield bare
    yield f" {bare}"
