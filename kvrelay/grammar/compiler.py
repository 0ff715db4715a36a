"""Compiles grammars within limits."""

from __future__ import annotations

import itertools
import json
import re
from collections import OrderedDict
from typing import assert_never

from llguidance import LLMatcher, LLParserLimits, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from kvrelay.grammar.vocabulary import Vocabulary
from kvrelay.protocol.request import Grammar, GrammarKind

LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""Bounds of the work to compile a grammar, about 20 ms, and to compute a mask, about 15 ms; a lexer state takes 2 KiB.

Otherwise the library's own. Past them a grammar is too complex.
"""


_MAX_REASON_CHARS = 300
_EXCERPT = re.compile(r" *\d+ \| |<non-verbose/>|<state>")
_PREFIX = re.compile(r"at \d+\(\d+\): failed to compile JSON schema: ")

_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
"""Text that must come is not tokenized by the library: the model chooses among its tokens."""


class GrammarError(Exception):
    """A grammar is invalid, too complex, or cannot be satisfied; the message says why, in one line.

    ``place``: the path of the wrong part of a JSON schema, such as ``properties.size``; empty: all of it. ``part``: the
    wrong part of a composed grammar, if one is.
    """

    def __init__(self, reason: str, place: str = "", part: str = "") -> None:
        super().__init__(reason)
        self.place = place
        self.part = part


def compile_grammar(grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
    """Return the matcher of ``grammar`` before its first token. Does not hold the GIL. Raises GrammarError."""
    matcher = LLMatcher(vocabulary.tokens, _source(grammar), log_level=0, limits=LIMITS)
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raise GrammarError if ``matcher`` has failed."""
    if matcher.is_error():
        raise GrammarError(_reason(matcher.get_error()))


def _reason(message: str) -> str:
    """Return the library's message in one line, without the excerpt of the source that follows it."""
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    lines = itertools.takewhile(lambda line: not _EXCERPT.match(line), message.splitlines())
    return _PREFIX.sub("", " ".join(" ".join(lines).split()))[:_MAX_REASON_CHARS]


def check_first_token(matcher: LLMatcher) -> None:
    """Raise GrammarError if nothing can come first: some contradictions show only in a mask."""
    mask = matcher.compute_bitmask()
    check(matcher)
    if not any(mask):
        raise GrammarError("no text satisfies it")


def parts_of(grammar: Grammar) -> dict[str, Grammar]:
    """Return the parts of a composed grammar by name."""
    parts = json.loads(grammar.text)["parts"]
    return {name: Grammar(GrammarKind(kind), text) for name, (kind, text) in parts.items()}


def _source(grammar: Grammar) -> str:
    """Return what the library compiles."""
    if grammar.kind is not GrammarKind.COMPOSED:
        return LLMatcher.grammar_from_lark(_lark(grammar) + _OPTIONS)
    whole = {"lark_grammar": json.loads(grammar.text)["lark"] + _OPTIONS}
    parts = [{"name": name, "lark_grammar": _lark(part)} for name, part in parts_of(grammar).items()]
    return json.dumps({"grammars": [whole, *parts]})


def _lark(grammar: Grammar) -> str:
    """Return ``grammar`` in the library's notation. Raises GrammarError."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return f"start: %json {grammar.text}"
        case GrammarKind.REGEX:
            return f"start: /{regex_to_lark(grammar.text)}/"
        case GrammarKind.CHOICE:
            return "start: " + " | ".join(map(json.dumps, json.loads(grammar.text)))
        case GrammarKind.GRAMMAR:
            try:
                return any_to_lark(grammar.text)
            except Exception as error:  # a parser in Python, which raises what it likes
                raise GrammarError(f"{error}") from error
        case GrammarKind.COMPOSED:
            raise GrammarError("a part cannot have parts")
        case unknown:
            assert_never(unknown)


class CompiledGrammars:
    """Matchers of the grammars used last, at most ``most``: requests with one schema compile it once."""

    def __init__(self, vocabulary: Vocabulary, most: int = 64) -> None:
        self._vocabulary = vocabulary
        self._most = most
        self._matchers: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def __len__(self) -> int:
        return len(self._matchers)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """Return a matcher of ``grammar`` of the caller's own. Raises GrammarError."""
        matcher = self._matchers.get(grammar)
        if matcher is None:
            matcher = self._matchers[grammar] = compile_grammar(grammar, self._vocabulary)
            if len(self._matchers) > self._most:
                self._matchers.popitem(last=False)
        else:
            self._matchers.move_to_end(grammar)
        return matcher.deep_copy()
