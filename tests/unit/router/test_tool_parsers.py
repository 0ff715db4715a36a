"""Parsers of tool calls and reasoning: what they find, and that it does not depend on how the text is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.tools.formats import FAMILIES
from router.tools.output_parser import OutputParser
from router.tools.parts import Call, Message, Text, joined
from router.tools.reasoning import ThinkParser

NAMES = ["f", "look_up"]

HERMES = {
    "no call": ("Hello.\n", Message("Hello.\n")),
    "one call": (
        'I look.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}\\"</tool_call>"}]}}\n</tool_call>\n',
        Message("I look.", calls=[Call("c0", "f", '{"a": [1, {"b": "}\\"</tool_call>"}]}')]),
    ),
    "two calls, keys in another order": (
        '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>\n'
        '<tool_call>\n{"id": 7, "name": "look_up", "parameters": {}}\n</tool_call>',
        Message(calls=[Call("c0", "f", '{"x": 1}'), Call("c1", "look_up", "{}")]),
    ),
    "text behind a call": (
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n\nDone. ',
        Message("Done. ", calls=[Call("c0", "f", "{}")]),
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', Message(calls=[Call("c0", "f", "{}")])),
    "arguments null": (
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        Message(calls=[Call("c0", "f", "{}")]),
    ),
    "arguments encoded once more": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        Message(calls=[Call("c0", "f", '{"a": 1}')]),
    ),
    "a brace too many": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>',
        Message(calls=[Call("c0", "f", '{"a": 1}')]),
    ),
    "a brace too few": (
        '<tool_call>{"name": "f", "arguments": {"a": {"b": 1}\n</tool_call> so',
        Message("so", calls=[Call("c0", "f", '{"a": {"b": 1}\n')]),
    ),
    "unknown tool": (
        'See <tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        Message('See <tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    ),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', Message('<tool_call>{"arguments": {}}</tool_call>')),
    "no JSON": ("<tool_call>f(1)</tool_call>", Message("<tool_call>f(1)</tool_call>")),
    "ends before the name": ('<tool_call>{"name": "lo', Message('<tool_call>{"name": "lo')),
    "ends within the arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": "x',
        Message(calls=[Call("c0", "f", '{"a": "x')]),
    ),
    "a mark within the mark": (
        '<tool_call><tool_call>{"name": "f", "arguments": {}}',
        Message("<tool_call>", calls=[Call("c0", "f", "{}")]),
    ),
    "half a mark": ("a <tool_ca", Message("a <tool_ca")),
}
OUTPUTS = [("hermes", name, *case) for name, case in HERMES.items()]

THOUGHTS = {
    "reasoning": ("<think>\nHm.\n\nYes.\n</think>\n\nYes.", False, Message("Yes.", "Hm.\n\nYes.")),
    "begun in the prompt": ("Hm.</think>Yes.", True, Message("Yes.", "Hm.")),
    "none": (" Yes <think>", False, Message(" Yes <think>")),
    "ends within": ("<think>Hm. </thi", False, Message("", "Hm. </thi")),
    "empty": ("<think>\n\n</think>\n\nYes.", False, Message("Yes.")),
    "half a mark": (" <thi", False, Message(" <thi")),
    "with a call": (
        '<think>I call <tool_call>.</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        False,
        Message("", "I call <tool_call>.", [Call("c0", "f", "{}")]),
    ),
}


def parsed(family: str, text: str, cuts: Sequence[int], think: ThinkParser | None = None) -> Message:
    """Return what comes out if ``text`` arrives in the pieces between ``cuts``."""
    numbers = itertools.count()
    calls = FAMILIES[family].parser(NAMES, lambda: f"c{next(numbers)}")
    parser = OutputParser(think, calls)
    places = [0, *cuts, len(text)]
    found = [part for start, end in itertools.pairwise(places) for part in parser.push(text[start:end])]
    found += parser.finish()
    assert Text("") not in found
    assert parser.has_calls == bool(joined(found).calls)
    return joined(found)


@pytest.mark.parametrize(("family", "name", "text", "message"), OUTPUTS)
def test_what_is_found_in_one_piece_and_in_single_characters(
    family: str, name: str, text: str, message: Message
) -> None:
    assert parsed(family, text, []) == message
    assert parsed(family, text, range(len(text))) == message


@pytest.mark.parametrize("name", THOUGHTS)
def test_reasoning(name: str) -> None:
    text, is_open, message = THOUGHTS[name]
    every: list[Sequence[int]] = [[], range(len(text)), range(0, len(text), 3)]
    for cuts in every:
        assert parsed("hermes", text, cuts, ThinkParser(is_open=is_open)) == message


PIECES = [
    '{"name": "f", ',
    '"arguments": {',
    '"a": "x\\"',
    '"}',
    "}",
    "</tool_call>",
    "<tool_call>",
    " ",
    "\n",
    "<think>",
]
PIECES += ["</think>", "[", "]", ",", '"', "f", "(", ")", "a=", "'", "1", ";", "<", "\\", '"name": "look_up"', "text"]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_cut_changes_what_is_found(family: str, data: st.DataObject) -> None:
    marks = [*FAMILIES[family].marks, *PIECES]
    text = "".join(data.draw(st.lists(st.sampled_from(marks), max_size=20)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    is_open = data.draw(st.booleans())
    whole = parsed(family, text, [], ThinkParser(is_open=is_open))
    assert parsed(family, text, cuts, ThinkParser(is_open=is_open)) == whole
    assert parsed(family, text, range(len(text)), ThinkParser(is_open=is_open)) == whole
