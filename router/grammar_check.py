"""Compiles the grammars of requests to refuse invalid ones. Only preparation workers import it."""

from __future__ import annotations

from functools import cache

from kvrelay.errors import InvalidRequestError
from kvrelay.grammar.checker import check_grammar
from kvrelay.grammar.compiler import GrammarError
from kvrelay.grammar.vocabulary import Vocabulary
from router.model import ServedModel
from router.openai.structured import Structure
from router.text.tokenizer import TextTokenizer

_MAX_CHARS = 300


def check_structure(structure: Structure, model: ServedModel) -> None:
    """Raise InvalidRequestError if the grammar is invalid; it names the field and the place in a JSON schema."""
    try:
        check_grammar(structure.grammar, _vocabulary(model.tokenizer, model.vocab_size))
    except GrammarError as error:
        field = (structure.fields or {}).get(error.part, structure.field)
        place = f"{field}.{error.place}" if error.place else field
        raise InvalidRequestError(
            f"{place[:_MAX_CHARS]}: {str(error)[:_MAX_CHARS]}", param=field.partition(".")[0]
        ) from None


@cache
def _vocabulary(tokenizer: TextTokenizer, vocab_size: int) -> Vocabulary:
    return Vocabulary.of(tokenizer.token_bytes, vocab_size)
