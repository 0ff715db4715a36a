"""What chat templates get of tools and reasoning, and which formats are found in them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from small_tokenizers import byte_level

from router.model import ServedModel
from router.openai.chat import chat_prompt
from router.openai.schemas import ChatCompletionRequest, TokenizeChatRequest, parse
from router.text.tokenizer import TextTokenizer
from router.tools.formats import has_reasoning, tool_family

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "null"}}}
TOOL = {"type": "function", "function": {"description": "Does it", "name": "f", "parameters": SCHEMA}}
TEMPLATE = (
    "{{ tools|tojson }}|{{ reasoning_effort }}|{{ enable_thinking }}|"
    "{% for message in messages %}"
    "{{ message.tool_calls|tojson if message.tool_calls else message.content }}"
    "{% endfor %}"
)


def rendered(
    kind: type[ChatCompletionRequest | TokenizeChatRequest] = ChatCompletionRequest, **fields: Any
) -> list[str]:
    """Return what the template writes of tools, effort, thinking and messages."""
    tokenizer = TextTokenizer(byte_level(), {}, TEMPLATE)
    model = ServedModel("demo", "demo", tokenizer, tokenizer.vocab_size, 512)
    token_ids = chat_prompt(parse(kind, {"messages": HI, **fields}), model)
    return tokenizer.decode(token_ids, skip_special_tokens=False).split("|")


@pytest.mark.parametrize("kind", [ChatCompletionRequest, TokenizeChatRequest])
def test_tools_as_the_client_wrote_them(kind: type[ChatCompletionRequest | TokenizeChatRequest]) -> None:
    tools, *_ = rendered(kind, tools=[TOOL])
    assert tools == json.dumps([TOOL])


def test_a_tool_without_type_and_parameters_and_with_nulls() -> None:
    tools, *_ = rendered(tools=[{"function": {"name": "f", "description": None}}])
    assert json.loads(tools) == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    ]


def test_no_tools() -> None:
    assert rendered() == ["null", "", "", "hi"]
    assert rendered(tools=[])[0] == "null"
    assert rendered(tools=[TOOL], tool_choice="none")[0] == "null"


def test_the_template_gets_all_tools_whichever_are_allowed() -> None:
    other = {"type": "function", "function": {"name": "g", "parameters": SCHEMA}}
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]}
    tools, *_ = rendered(tools=[TOOL, other], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert json.loads(tools) == [TOOL, other]


def test_a_template_for_chats_with_tools() -> None:
    tokenizer = TextTokenizer(byte_level(), {}, "plain", "<tool_call> {{ tools|length }}")
    model = ServedModel("demo", "demo", tokenizer, tokenizer.vocab_size, 512)
    found = []
    for fields in ({}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "none"}):
        token_ids = chat_prompt(parse(ChatCompletionRequest, {"messages": HI, **fields}), model)
        found.append(tokenizer.decode(token_ids, skip_special_tokens=False))
    assert found == ["plain", "<tool_call> 1", "plain"]
    assert TextTokenizer(byte_level(), {}, "plain").tool_template == "plain"


def test_verbosity() -> None:
    tokenizer = TextTokenizer(byte_level(), {}, "{{ verbosity }}|{{ reasoning_effort }}")
    model = ServedModel("demo", "demo", tokenizer, tokenizer.vocab_size, 512)

    def written(**fields: Any) -> str:
        return tokenizer.decode(chat_prompt(parse(ChatCompletionRequest, {"messages": HI, **fields}), model))

    assert written() == "|"
    assert written(verbosity="low") == "low|"
    assert written(verbosity="high", reasoning_effort="low") == "high|low"
    assert written(verbosity="high", chat_template_kwargs={"verbosity": "low"}) == "low|"


def test_reasoning_effort() -> None:
    assert rendered(reasoning_effort="low")[1:3] == ["low", ""]
    assert rendered(reasoning_effort="none")[1:3] == ["none", "False"]
    assert rendered(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})[1:3] == ["none", "True"]


def test_calls_in_messages_have_their_arguments_as_objects() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"b": "x"}'}}
    *_, text = rendered(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert json.loads(text)[0]["function"]["arguments"] == {"b": "x"}


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("... within <tool_call></tool_call> XML tags ...", "hermes"),
        ("{{- '[TOOL_CALLS] [' }}", "mistral"),
        ("{{- '<|python_tag|>' + name }}", "llama3"),
        ('Respond with {"name": function name, "parameters": dictionary of argument name and its value}.', "llama3"),
        ("You SHOULD put it in the format of [func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_the_format_is_found_in_the_template(template: str | None, family: str | None) -> None:
    found = tool_family("auto", template)
    assert (found.name if found else None) == family
    assert tool_family("none", template) is None
    configured = tool_family("pythonic", template)
    assert configured is not None
    assert configured.name == "pythonic"


def test_reasoning_is_found_in_the_template() -> None:
    assert has_reasoning("auto", "{{ '<think>' }}")
    assert not has_reasoning("auto", "{{ messages }}")
    assert not has_reasoning("auto", None)
    assert has_reasoning("think", None)
    assert not has_reasoning("none", "<think>")
