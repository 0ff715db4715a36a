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
from router.tools.text_scan import Found, MarkScanner

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

LLAMA3 = {
    "no call": (" Hello {", Message(" Hello {")),
    "one call": ('{"name": "f", "parameters": {"a": "x"}}', Message(calls=[Call("c0", "f", '{"a": "x"}')])),
    "with the tag, two calls": (
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}; {"name": "look_up", "arguments": {"a": 1}}',
        Message(calls=[Call("c0", "f", "{}"), Call("c1", "look_up", '{"a": 1}')]),
    ),
    "text behind": ('{"name": "f", "parameters": {}}\nDone.', Message("Done.", calls=[Call("c0", "f", "{}")])),
    "another object": ('{"size": {"name": "f"}}', Message('{"size": {"name": "f"}}')),
    "a built-in tool": ('<|python_tag|>search.call(q="x")', Message('search.call(q="x")')),
    "unknown tool": ('{"name": "rm", "parameters": {}} x', Message('{"name": "rm", "parameters": {}} x')),
    "unknown tool behind a call": (
        '{"name": "f", "parameters": {}};{"name": "rm"}',
        Message('{"name": "rm"}', calls=[Call("c0", "f", "{}")]),
    ),
    "ends early": ('{"name"', Message('{"name"')),
    "half a tag": (" <|python", Message(" <|python")),
}
MISTRAL = {
    "no call": ("Hello [TOOL", Message("Hello [TOOL")),
    "a list": (
        'I look.\n[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"arguments": {}, "name": "look_up"}]',
        Message("I look.", calls=[Call("c0", "f", '{"a": 1}'), Call("c1", "look_up", "{}")]),
    ),
    "one object": ('[TOOL_CALLS]{"name": "f", "arguments": {}} so', Message("so", calls=[Call("c0", "f", "{}")])),
    "by name": (
        '[TOOL_CALLS]f[ARGS]{"a": "}"}[TOOL_CALLS]look_up[CALL_ID]abc[ARGS] {}',
        Message(calls=[Call("c0", "f", '{"a": "}"}'), Call("c1", "look_up", "{}")]),
    ),
    "by name without a mark": ('[TOOL_CALLS]f{"a": 1}', Message(calls=[Call("c0", "f", '{"a": 1}')])),
    "unknown tools": (
        '[TOOL_CALLS]rm[ARGS]{} [TOOL_CALLS] [{"name": "rm"}]',
        Message('[TOOL_CALLS]rm[ARGS]{} [TOOL_CALLS] [{"name": "rm"}]'),
    ),
    "an empty list": ("[TOOL_CALLS] []", Message("[TOOL_CALLS] []")),
    "ends early": ('[TOOL_CALLS] [{"na', Message('[TOOL_CALLS] [{"na')),
    "ends at once": ("[TOOL_CALLS] [", Message("[TOOL_CALLS] [")),
    "ends behind the mark": ("[TOOL_CALLS]lo", Message("[TOOL_CALLS]lo")),
    "ends within the arguments": ('[TOOL_CALLS]f[ARGS]{"a', Message(calls=[Call("c0", "f", '{"a')])),
}
PYTHONIC = {
    "no call": ("[1, 2]", Message("[1, 2]")),
    "values": (
        r"""[f(a=1, b='it\'s "x"\n\u017d\x41\q', c=[True, None, (1.5, -2, .5),], d={'x': {}, "y": []}), look_up( )]""",
        Message(
            calls=[
                Call(
                    "c0",
                    "f",
                    r"""{"a": 1, "b": "it's \"x\"\nŽA\\q", "c": [true, null, [1.5, -2, 0.5]], """
                    r""""d": {"x": {}, "y": []}}""",
                ),
                Call("c1", "look_up", "{}"),
            ]
        ),
    ),
    "with marks": ("<|python_start|>[f()]<|python_end|>", Message(calls=[Call("c0", "f", "{}")])),
    "text behind": ("[f()]\n\nDone.", Message("Done.", calls=[Call("c0", "f", "{}")])),
    "unknown tool": ("[rm(a=1)] so", Message("[rm(a=1)] so")),
    "a value that is no literal": (
        "[f(a=1, b=g(2))]",
        Message("g(2))]", calls=[Call("c0", "f", '{"a": 1, "b": ')]),
    ),
    "ends early": ("[look_", Message("[look_")),
    "ends within a string": ("[f(a='x", Message(calls=[Call("c0", "f", '{"a": "x')])),
    "not an argument by name": ("[f(1)]", Message("1)]", calls=[Call("c0", "f", "{")])),
    "a set": ("[f(a={1})]", Message("1})]", calls=[Call("c0", "f", '{"a": {')])),
    "half a mark": ("<|python_st", Message("<|python_st")),
}
FORMATS = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "pythonic": PYTHONIC}
OUTPUTS = [(family, name, *case) for family, cases in FORMATS.items() for name, case in cases.items()]

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


@pytest.mark.parametrize(("family", "mark"), [("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]")])
def test_a_long_object_that_is_no_call_is_searched_once(
    family: str, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held back until it is known to be none, and may be full of marks."""
    text = mark + '{"id": "' + (mark + "{") * 3000 + '" so'
    push, lengths = MarkScanner.push, []

    def counted(scanner: MarkScanner, piece: str) -> Found:
        lengths.append(len(piece))
        return push(scanner, piece)

    monkeypatch.setattr(MarkScanner, "push", counted)
    assert parsed(family, text, range(0, len(text), 50)) == Message(text)
    assert sum(lengths) < 2 * len(text)


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
PIECES += [
    "[f(",
    "a=[1, ",
    "'x'",
    "look_up(",
    ")]",
    ", ",
    '{"name": "f", "parameters": {}}',
    "[ARGS]",
    "f[ARGS]",
    "{'k': ",
]
PIECES += ["True", "(", "-2.5", "\\u00", "e9", "[CALL_ID]ab"]


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
