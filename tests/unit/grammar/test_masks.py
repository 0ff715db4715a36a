"""Masks follow from a grammar and the tokens so far, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.schemas import END, VOCAB_SIZE, drawn_schema, json_schema

from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.errors import EngineError
from kvrelay.grammar.compiler import CompiledGrammars, GrammarError
from kvrelay.grammar.constraint import GrammarConstraint, Wanted
from kvrelay.grammar.masks import GrammarMasks
from kvrelay.grammar.vocabulary import Vocabulary
from kvrelay.protocol.request import Grammar, GrammarKind, SamplingParams
from kvrelay.tokenizer.plain import plain_tokens

NUMBER = json_schema({"type": "integer", "minimum": 10, "maximum": 120})
_plain = plain_tokens(VOCAB_SIZE)


def ids(text: str) -> list[int]:
    found: list[int] = _plain.encode(text).ids
    return found


@pytest.fixture
def grammars() -> Iterator[GrammarMasks]:
    grammars = GrammarMasks(VOCAB_SIZE)
    yield grammars
    grammars.close()


def constraint(grammars: GrammarMasks, grammar: Grammar = NUMBER, **sampling: Any) -> GrammarConstraint:
    params = SamplingParams(max_tokens=9, seed=0, grammar=grammar, **{"eos_token_ids": [END], **sampling})
    found = grammars.constraint(params)
    assert isinstance(found, GrammarConstraint)
    return found


def allowed(constraint: GrammarConstraint, place: int) -> list[int]:
    """Return the tokens that may come after ``place`` output tokens."""
    tokens: list[int] = np.flatnonzero(constraint.allowed(place)).tolist()
    return tokens


def test_what_may_come_next(grammars: GrammarMasks) -> None:
    one = constraint(grammars)
    grammars.begin([Wanted(one, [], [])])
    assert allowed(one, 0) == ids("123456789")
    grammars.begin([Wanted(one, ids("1"), [])])
    assert allowed(one, 1) == ids("0123456789")
    grammars.begin([Wanted(one, ids("2"), [])])
    assert allowed(one, 2) == [*ids("0"), END]
    grammars.begin([Wanted(one, ids("0"), [])])
    assert allowed(one, 3) == [END]


def test_after_drafts(grammars: GrammarMasks) -> None:
    one = constraint(grammars)
    grammars.begin([Wanted(one, ids("1"), ids("2x5"))])
    assert allowed(one, 1) == ids("0123456789")
    assert allowed(one, 2) == [*ids("0"), END]
    assert allowed(one, 3) == allowed(one, 4) == []
    grammars.begin([Wanted(one, ids("3"), [])])
    assert allowed(one, 2) == [END]


def test_drafts_of_one_sequence_change_no_mask_of_others(grammars: GrammarMasks) -> None:
    several = [constraint(grammars) for _ in range(4)]
    grammars.begin(
        [Wanted(one, ids("1"), ids(drafts)) for one, drafts in zip(several, ["", "2", "x", "12"], strict=True)]
    )
    assert [allowed(one, 1) for one in several] == [ids("0123456789")] * 4
    assert allowed(several[3], 2) == [*ids("0123456789"), END]


@pytest.mark.parametrize("seed", range(8))
def test_a_new_node_goes_on_where_another_stopped(grammars: GrammarMasks, seed: int) -> None:
    """A constraint that is told all tokens at once allows what one does that was told them one by one."""
    rng = np.random.default_rng(seed)
    old = constraint(grammars, json_schema(drawn_schema(seed)))
    output: list[int] = []
    newest: list[int] = []
    while len(output) < 60:
        grammars.begin([Wanted(old, newest, [int(token) for token in rng.integers(0, VOCAB_SIZE, rng.integers(3))])])
        new = constraint(grammars, json_schema(drawn_schema(seed)))
        grammars.begin([Wanted(new, output, [])])
        found = allowed(old, len(output))
        assert allowed(new, len(output)) == found
        newest = [int(rng.choice(found))]
        output += newest
        if newest == [END]:
            break


def test_the_tokens_that_end_a_request(grammars: GrammarMasks) -> None:
    """EOS comes only where the text may end, a stop token also where it is text."""
    letter, stop, eos = ids("a")[0], ids("b")[0], ids("c")[0]
    one = constraint(
        grammars, Grammar(GrammarKind.REGEX, "[a-c]{1,2}"), eos_token_ids=[eos], stop_token_ids=[stop, END]
    )
    grammars.begin([Wanted(one, [], [])])
    assert allowed(one, 0) == [letter, stop]
    grammars.begin([Wanted(one, [letter], [letter])])
    assert allowed(one, 1) == sorted([letter, stop, eos, END])
    assert allowed(one, 2) == sorted([stop, eos, END])


@pytest.mark.parametrize(
    ("grammar", "output", "reason"),
    [
        (Grammar(GrammarKind.REGEX, "("), "", "unclosed group"),
        (Grammar(GrammarKind.GRAMMAR, 'root ::= "a'), "", "Unexpected end of input"),
        (NUMBER, "x", "doesn't satisfy the grammar"),
    ],
)
def test_a_grammar_that_fails_fails_alone(grammars: GrammarMasks, grammar: Grammar, output: str, reason: str) -> None:
    broken, other = constraint(grammars, grammar), constraint(grammars)
    for _ in range(2):
        grammars.begin([Wanted(broken, ids(output), []), Wanted(other, [], [])])
        with pytest.raises(EngineError, match=f"the grammar cannot go on: .*{reason}"):
            broken.allowed(broken.num_told)
        assert allowed(other, 0) == ids("123456789")


def test_without_a_tokenizer_requests_fail_and_say_so(tmp_path: Path) -> None:
    grammars = GrammarMasks(VOCAB_SIZE, tmp_path)
    grammars.open()
    one = constraint(grammars)
    grammars.begin([Wanted(one, [], [])])
    with pytest.raises(EngineError, match=r"tokenizer\.json is missing"):
        one.allowed(0)
    grammars.close()


def test_the_tokens_of_a_checkpoint(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "qwen2")
    vocabulary = Vocabulary.load(tmp_path, 400)
    assert vocabulary.tokens.vocab_size == vocabulary.size + 1 == 401
    matcher = CompiledGrammars(vocabulary).matcher(Grammar(GrammarKind.CHOICE, '["ab"]'))
    for token, ends in ((b"a", False), (b"b", True)):
        token_id = next(i for i in range(400) if vocabulary.tokens.decode_bytes([i]) == token)
        assert matcher.consume_token(token_id)
        assert matcher.is_accepting() is ends


def test_compiled_grammars_are_kept_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = CompiledGrammars(Vocabulary.plain(VOCAB_SIZE), most=2)
    first, second, third = (Grammar(GrammarKind.REGEX, text) for text in "abc")
    for grammar in (first, second, first, third):
        assert not compiled.matcher(grammar).is_error()
    assert len(compiled) == 2
    with pytest.raises(GrammarError):
        compiled.matcher(Grammar(GrammarKind.REGEX, "("))
    assert len(compiled) == 2
    monkeypatch.setattr("kvrelay.grammar.compiler.compile_grammar", None)
    assert compiled.matcher(first).consume_tokens(ids("a"))
    assert compiled.matcher(first).consume_tokens(ids("a"))  # a copy of its own
    with pytest.raises(TypeError):
        compiled.matcher(second)
