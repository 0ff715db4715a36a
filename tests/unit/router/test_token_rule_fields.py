"""``allowed_token_ids`` and ``bad_words`` become rules of the request, or errors that say what is wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest
from instant_router import InstantRouter
from small_tokenizers import byte_level, sentencepiece_like
from tokenizers import Tokenizer

from kvrelay.errors import InvalidRequestError
from kvrelay.protocol.request import Grammar, GrammarKind
from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask
from kvrelay.tokenizer.plain import plain_tokens
from router.model import ServedModel
from router.openai.field_types import MAX_BAD_WORD_CHARS, MAX_BAD_WORDS
from router.openai.sampling import RequestSampling
from router.openai.schemas import CompletionRequest
from router.openai.structured import Structure
from router.openai.token_rules import MAX_BAD_WORD_TOKENS, token_rules_of
from router.preparation import INLINE_BAD_WORDS
from router.text.tokenizer import TextTokenizer

VOCAB_SIZE = 1024
STOP = 40
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "n": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
}
_plain = plain_tokens(VOCAB_SIZE)


def ids(text: str) -> list[int]:
    found: list[int] = _plain.encode(text).ids
    return found


def refused(**fields: Any) -> tuple[str, str]:
    """Return the field and the message of the 400."""
    response = InstantRouter().post("/v1/completions", {"prompt": "a", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "invalid_request_error"
    return error["param"], error["message"]


@pytest.mark.parametrize("path", BODIES)
def test_the_rules_of_a_request(path: str) -> None:
    router = InstantRouter()
    router.answer(path, {**BODIES[path], "allowed_token_ids": [7, 9.0, 7], "bad_words": ["b", "cd"]})
    words = [ids("b"), ids(" b"), ids("cd"), ids(" cd")]
    rules = TokenRules(token_mask([7, 9], VOCAB_SIZE), BadWords.of(words))
    assert {new.request_id for new in router.service.submitted} != set()
    assert all(new.sampling.token_rules == rules for new in router.service.submitted)


@pytest.mark.parametrize("fields", [{}, {"bad_words": []}, {"bad_words": None, "allowed_token_ids": None}])
def test_a_request_without_rules_has_none(fields: dict[str, Any]) -> None:
    router = InstantRouter()
    router.answer("/v1/completions", {"prompt": "a", **fields})
    assert router.last.sampling.token_rules is None


def test_long_fields_are_prepared_in_a_worker_and_do_not_come_back() -> None:
    rng = random.Random(1)
    allowed = rng.choices(range(VOCAB_SIZE), k=60_000)
    words = [f"w{number}" for number in range(INLINE_BAD_WORDS + 1)]
    router = InstantRouter()
    router.answer("/v1/completions", {"prompt": "a", "allowed_token_ids": allowed, "bad_words": words})
    spelled = BadWords.of([ids(blank + word) for word in words for blank in ("", " ")])
    assert router.last.sampling.token_rules == TokenRules(token_mask(allowed, VOCAB_SIZE), spelled)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1 items"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids", f"vocabulary has {VOCAB_SIZE}"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids.0", "0 or more"),
        ({"allowed_token_ids": ["7"]}, "allowed_token_ids.0", "an integer"),
        ({"allowed_token_ids": "7"}, "allowed_token_ids", "a list"),
        ({"bad_words": "word"}, "bad_words", "a list"),
        ({"bad_words": ["a", ""]}, "bad_words.1", "at least 1 characters"),
        ({"bad_words": [7]}, "bad_words.0", "a string"),
        ({"bad_words": ["a" * (MAX_BAD_WORD_CHARS + 1)]}, "bad_words.0", f"at most {MAX_BAD_WORD_CHARS} characters"),
        ({"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}, "bad_words", f"at most {MAX_BAD_WORDS} items"),
        ({"bad_words": ["a" * 100] * 60}, "bad_words", f"more than {MAX_BAD_WORD_TOKENS} tokens"),
        ({"bad_words": ["b"], "allowed_token_ids": ids("b")}, "bad_words", "leave none of allowed_token_ids"),
        (
            {"allowed_token_ids": [STOP], "stop_token_ids": [STOP], "min_tokens": 1, "max_tokens": 2},
            "min_tokens",
            "only tokens that end the output",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_limit(fields: dict[str, Any], param: str, reason: str) -> None:
    assert (name := refused(**fields))[0] == param.partition(".")[0]
    assert name[1].startswith(f"{param}: ") and reason in name[1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [7, STOP], "bad_words": ["x"]}, None),
        ({"allowed_token_ids": [7]}, "allowed_token_ids"),
        ({"bad_words": [_plain.decode([STOP])]}, "bad_words"),
        ({"allowed_token_ids": [7, STOP], "bad_words": [_plain.decode([STOP])]}, "allowed_token_ids"),
    ],
)
def test_with_a_grammar_the_output_must_be_able_to_end(fields: dict[str, Any], param: str | None) -> None:
    model = ServedModel("demo", "nowhere", TextTokenizer(_plain, {}), VOCAB_SIZE, 512)
    request = CompletionRequest(prompt="a", stop_token_ids=[STOP], **fields)
    structure = Structure("guided_regex", Grammar(GrammarKind.REGEX, "a"))
    rules = token_rules_of(request, model)
    if param is None:
        params = RequestSampling(request, model, 512, structure, rules).of(1)
        assert (params.grammar, params.token_rules) == (structure.grammar, rules)
        return
    with pytest.raises(InvalidRequestError, match="leave no token to end the output of guided_regex") as raised:
        RequestSampling(request, model, 512, structure, rules)
    assert raised.value.param == param


def spelled(tokenizer: Tokenizer, *words: str) -> list[list[str]]:
    """Return the tokens of the bad words that a model with ``tokenizer`` makes of ``words``."""
    model = ServedModel("demo", "nowhere", TextTokenizer(tokenizer, {}), tokenizer.get_vocab_size(), 512)
    rules = token_rules_of(CompletionRequest(prompt="a", bad_words=list(words)), model)
    assert rules is not None and rules.bad_words is not None
    several = [word for words in rules.bad_words.after.values() for word in words]
    sequences = [*([token] for token in rules.bad_words.always), *several]
    return sorted([str(tokenizer.id_to_token(token)) for token in sequence] for sequence in sequences)


def test_a_word_is_excluded_at_the_beginning_of_a_text_and_after_a_blank() -> None:
    tokens = byte_level()
    assert spelled(tokens, "hello") == spelled(tokens, "  hello")
    assert [["".join(one).replace("\u0120", " ")] for one in spelled(tokens, "hello")] == [["hello"], [" hello"]]
    assert spelled(tokens, "\n") == [["\u010a"]]


def test_no_special_token_is_part_of_a_word() -> None:
    """This tokenizer begins every text with one, and with a blank."""
    assert spelled(sentencepiece_like(), "the") == [["\u2581", "\u2581the"], ["\u2581the"]]


def test_a_token_that_the_model_lacks_is_refused() -> None:
    tokenizer = byte_level()
    model = ServedModel("demo", "nowhere", TextTokenizer(tokenizer, {}), tokenizer.get_vocab_size() - 1, 512)
    with pytest.raises(InvalidRequestError, match="bad_words: '<think here>' is token"):
        token_rules_of(CompletionRequest(prompt="a", bad_words=["<think here>"]), model)
