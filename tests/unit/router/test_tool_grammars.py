"""Grammars of calls that must come: what they accept, with reasoning and structured output."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from instant_router import InstantRouter
from llguidance import LLMatcher
from small_tokenizers import EOS, byte_level, token_id
from support.schemas import END, VOCAB_SIZE
from support.tools import Answering, check_calls, drawn_request, model_of

from kvrelay.grammar.compiler import compile_grammar
from kvrelay.grammar.vocabulary import Vocabulary
from kvrelay.protocol.request import FinishReason, Grammar, GrammarKind
from router.model import ServedModel
from router.openai.output_grammar import chat_structure
from router.openai.schemas import ChatCompletionRequest, parse
from router.text.tokenizer import TextTokenizer
from router.tools.formats import FAMILIES

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
SIZE = {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SIZE}}, {"function": {"name": "g"}}]
VOCABULARY = Vocabulary.plain(VOCAB_SIZE)
TEXTS = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"size": 3}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"size": 3}}]',
    "llama3": '{"name": "f", "parameters": {"size": 3}}',
    "pythonic": '{"name": "f", "parameters": {"size": 3}}',
}
"""The one call of f in each format."""

SEVERAL = {"hermes": "\n", "llama3": "; ", "pythonic": "; "}


def asked(**fields: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, {"messages": HI, "tools": TOOLS, **fields})


def grammar_of(model: ServedModel, request: ChatCompletionRequest, prompt: str = "x") -> Grammar:
    structure = chat_structure(request, model, model.tokenizer.encode(prompt))
    assert structure is not None
    return structure.grammar


def accepts(grammar: Grammar, text: str, model: ServedModel) -> bool:
    """Return whether an output may be ``text`` and end there."""
    matcher = compile_grammar(grammar, VOCABULARY)
    tokens = model.tokenizer.encode(text)
    return bool(matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens)) and (
        matcher.is_accepting()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_accepted(family: str) -> None:
    model, one = model_of(family), TEXTS[family]
    named = {"type": "function", "function": {"name": "f"}}
    required = grammar_of(model, asked(tool_choice="required"))
    single = grammar_of(model, asked(tool_choice="required", parallel_tool_calls=False))
    assert accepts(required, one, model)
    assert accepts(single, one, model)
    assert accepts(grammar_of(model, asked(tool_choice=named)), one, model)
    other = one.replace('"f"', '"g"').replace('{"size": 3}', "{}")
    assert accepts(required, other, model)
    assert not accepts(grammar_of(model, asked(tool_choice=named)), other, model)
    for wrong in ("", "Hello", f"Hello {one}", one.replace("3", '"3"'), one.replace('"f"', '"h"'), one[:-1]):
        assert not accepts(required, wrong, model), wrong
    several = SEVERAL[family].join([one, other]) if family in SEVERAL else f"{one[:-1]}, {other.partition(' [')[2]}"
    assert accepts(required, several, model)
    assert not accepts(single, several, model)


def test_only_allowed_tools_may_be_called() -> None:
    model = model_of("llama3")
    g = {"type": "function", "function": {"name": "g"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [g]}}
    grammar = grammar_of(model, asked(tool_choice=choice))
    assert accepts(grammar, '{"name": "g", "parameters": {}}', model)
    assert not accepts(grammar, TEXTS["llama3"], model)


def test_reasoning_comes_first() -> None:
    model = model_of("hermes", reasons=True)
    one, request = TEXTS["hermes"], asked(tool_choice="required")
    grammar = grammar_of(model, request)
    assert accepts(grammar, f"<think>\nI call </thi.\n</think>\n\n{one}", model)
    assert accepts(grammar, one, model)
    assert not accepts(grammar, "<think>\nI call.", model)
    begun = grammar_of(model, request, "assistant: <think>\n")
    assert accepts(begun, f"I call.</think>{one}", model)
    assert not accepts(begun, one, model)
    closed = grammar_of(model, request, "assistant: <think>\n\n</think>\n\n")
    assert accepts(closed, one, model)
    assert not accepts(closed, f"<think></think>{one}", model)


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SIZE}}}, '{"size": 1}'),
        ({"structured_outputs": {"regex": "[ab]+"}}, "abba"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, "b"),
    ],
)
def test_structured_output_with_tools_and_reasoning(wish: dict[str, Any], text: str) -> None:
    model = model_of("hermes", reasons=True)
    grammar = grammar_of(model, asked(**wish))
    for reasoning in ("", "<think>Hm.</think>\n"):
        assert accepts(grammar, reasoning + text, model)
        assert accepts(grammar, reasoning + TEXTS["hermes"], model)
        assert not accepts(grammar, f"{reasoning}Hello", model)
    without_tools = grammar_of(model, asked(**wish, tools=None))
    assert accepts(without_tools, f"<think>Hm.</think>{text}", model)
    assert not accepts(without_tools, TEXTS["hermes"], model)


def test_a_response_format_says_nothing_of_calls_that_must_come() -> None:
    model = model_of("hermes")
    request = asked(tool_choice="required", response_format={"type": "json_object"})
    assert grammar_of(model, request) == grammar_of(model, asked(tool_choice="required"))


def test_no_grammar_without_a_wish() -> None:
    assert chat_structure(asked(), model_of("hermes", reasons=True), [65]) is None


@pytest.mark.parametrize("family", [*FAMILIES, None])
def test_whatever_the_model_writes_is_a_valid_call(family: str | None) -> None:
    model = model_of(family)
    for seed in range(8):
        request, rng = drawn_request(seed), random.Random(seed)
        matcher = compile_grammar(grammar_of(model, request), VOCABULARY)
        token_ids = drawn_output(matcher, rng)
        check_calls(request, Answering(model, request).whole([*token_ids, END], FinishReason.STOP))


def drawn_output(matcher: LLMatcher, rng: random.Random) -> list[int]:
    """Return tokens that the grammar allows, drawn without any preference."""
    token_ids: list[int] = []
    while True:
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(VOCAB_SIZE + 1) if mask[token // 8] >> token % 8 & 1]
        token = rng.choice(allowed)
        if token == VOCABULARY.end:
            return token_ids
        assert matcher.consume_token(token)
        token_ids.append(token)


def refused(**fields: Any) -> tuple[str, str]:
    body = {"messages": HI, "tools": TOOLS, "tool_choice": "required", "stop_token_ids": [END], **fields}
    response = InstantRouter(tool_parser="hermes").post(CHAT, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


def test_an_invalid_schema_is_refused_with_its_place() -> None:
    wrong = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "strng"}}}}
    tools = [TOOLS[1], {"function": {"name": "h", "parameters": wrong}}]
    param, message = refused(tools=tools)
    assert param == "tools"
    assert message.startswith("tools.1.function.parameters.properties.a.items: Invalid type: strng")


def test_what_contradicts_calls() -> None:
    assert refused(ignore_eos=True) == ("ignore_eos", "ignore_eos: not together with tools")
    assert refused(guided_regex="a") == ("guided_regex", "guided_regex: not together with tool_choice")
    big = {"type": "object", "properties": {"a": {"enum": ["x" * 1000 + str(n) for n in range(140)]}}}
    param, message = refused(tools=[{"function": {"name": "h", "parameters": big}}])
    assert (param, "131072 bytes" in message) == ("tools", True)


def test_a_deep_schema_is_refused() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}}
    param, _ = refused(tools=[{"function": {"name": "h", "parameters": deep}}])
    assert param == "tools"


def test_the_grammar_is_sent_to_the_nodes() -> None:
    router = InstantRouter(tool_parser="hermes")
    body = {"messages": HI, "tools": TOOLS, "tool_choice": "required", "stop_token_ids": [END]}
    for _ in range(2):  # compiled in a worker first, then known
        assert router.post(CHAT, body).status_code == 200
        grammar = router.last.sampling.grammar
        assert grammar is not None
        assert grammar.kind is GrammarKind.COMPOSED
        assert sorted(json.loads(grammar.text)["parts"]) == ["t0", "t1"]


def test_marks_that_are_special_tokens() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"])
    text_tokenizer = TextTokenizer(tokenizer, {"eos_token": EOS})
    marks = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>")
    model = ServedModel(
        name="demo",
        root="demo",
        tokenizer=text_tokenizer,
        vocab_size=text_tokenizer.vocab_size,
        max_model_len=4096,
        eos_token_ids=(token_id(tokenizer, EOS),),
        tool_family=FAMILIES["mistral"],
        reasons=True,
        mark_ids=text_tokenizer.special_ids(marks),
    )
    assert len(model.mark_ids) == 4
    request = asked(tool_choice="required")
    output = text_tokenizer.encode('<think>Hm.</think>\n[TOOL_CALLS]f[ARGS]{"size": 3}[TOOL_CALLS]g[ARGS]{}')
    assert not model.mark_ids - set(output)
    matcher = compile_grammar(
        grammar_of(model, request), Vocabulary.of(text_tokenizer.token_bytes, text_tokenizer.vocab_size)
    )
    assert matcher.validate_tokens(output) == len(output)
    assert matcher.consume_tokens(output)
    assert matcher.is_accepting()
    choice = Answering(model, request).whole([*output, *model.eos_token_ids], FinishReason.STOP)
    assert choice["message"]["reasoning_content"] == "Hm."
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["f", "g"]
    check_calls(request, choice)
