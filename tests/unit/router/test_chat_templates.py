"""Chats through templates with the constructs of many model families, against what transformers makes of them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from golden.chat_cases import CHATS, CHATS_FILE, SPECIAL_TOKENS, TEMPLATES

from kvrelay.errors import InvalidRequestError
from router.openai.schemas import TokenizeChatRequest, parse
from router.text.chat_template import ChatTemplate

GOLDEN = json.loads(CHATS_FILE.read_text())["cases"]


@cache
def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL_TOKENS)


def rendered(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return the prompt for messages as a client sends them."""
    request = parse(TokenizeChatRequest, {"messages": messages})
    return template_of(source).render([message.model_dump() for message in request.messages], **options)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_becomes_the_prompt_of_transformers(name: str, chat: str) -> None:
    messages, options, variables = CHATS[chat]
    expected = GOLDEN[name][chat]
    if expected is None:
        with pytest.raises(InvalidRequestError):
            rendered(TEMPLATES[name].source, messages, **options, variables=variables)
    else:
        assert rendered(TEMPLATES[name].source, messages, **options, variables=variables) == expected


# ---------------------------------------------------------------- content


PARTS_ONLY = TEMPLATES["parts_only"].source
CHATML = TEMPLATES["chatml"].source


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def test_text_reaches_a_template_that_iterates_over_parts() -> None:
    assert rendered(PARTS_ONLY, [{"role": "user", "content": "Hi"}]) == "User: Hi<end_of_utterance>\nAssistant:"


def test_parts_are_joined_by_the_template_if_it_takes_parts_and_are_lines_if_not() -> None:
    messages = [{"role": "user", "content": parts("one", "two")}]
    assert "onetwo" in rendered(PARTS_ONLY, messages)
    assert "onetwo" in rendered(TEMPLATES["glm"].source, messages)
    assert "one\ntwo" in rendered(CHATML, messages)


@pytest.mark.parametrize(
    "printed", ["{{ message.content }}", "{{ message.content | tojson }}", "{{ message | tojson | tojson }}"]
)
def test_a_template_that_prints_parts_as_objects_gets_text(printed: str) -> None:
    source = "{% for message in messages %}" + printed + "{% endfor %}"
    assert '"type' not in rendered(source, [{"role": "user", "content": parts("one", "two")}]).replace("'", '"')


@pytest.mark.parametrize(
    ("condition", "before"),
    [
        ("messages[0].role != 'system'", [{"role": "system", "content": "s"}]),
        ("messages[-1].role != 'assistant'", []),
        ("messages | length < 3", [{"role": "user", "content": "u"}]),
    ],
)
def test_forms_are_found_though_a_template_asks_for_other_messages_too(condition: str, before: list[Any]) -> None:
    refuse = "{% if " + condition + " %}{{ raise_exception('no') }}{% endif %}"
    messages = [*before, {"role": "user", "content": parts("one", "two")}, {"role": "assistant", "content": "Hi"}]
    assert "onetwo" in rendered(refuse + PARTS_ONLY, messages) and "Hi" in rendered(refuse + PARTS_ONLY, messages)


def test_roles_differ_in_the_form_they_take() -> None:
    source = (
        "{% for message in messages %}{% if message.role == 'user' %}"
        "{% for part in message.content %}({{ part.text }}){% endfor %}"
        "{% else %}{{ message.role + ':' + message.content }}{% endif %}{% endfor %}"
    )
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": parts("a", "b")},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": parts("d")},
        {"role": "user", "content": parts("e", "f")},
    ]
    assert rendered(source, messages) == "system:a\nb(c)assistant:d(e)(f)"


def test_content_that_is_null_is_as_absent_for_a_template_that_asks() -> None:
    source = (
        "{% for message in messages %}{{ message.role }}"
        "{% if message.content is defined %}[{{ message.content }}]{% endif %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    for caller in ({"content": None}, {}):
        assert rendered(source, [{"role": "assistant", "tool_calls": [call], **caller}]) == "assistant"
    assert rendered(source, [{"role": "assistant", "content": ""}]) == "assistant[]"


def test_content_that_is_null_is_empty_for_a_template_that_needs_some() -> None:
    assert rendered(CHATML, [{"role": "user", "content": None}]).startswith("<|im_start|>user\n<|im_end|>")
    assert rendered(PARTS_ONLY, [{"role": "user"}]).startswith("User: <end_of_utterance>")


def test_an_error_of_the_template_stays_one_though_content_is_absent() -> None:
    with pytest.raises(InvalidRequestError, match="chat template refuses"):
        rendered("{{ messages[0]['nothing'] + 'x' }}", [{"role": "user"}])


def test_the_last_message_to_continue_needs_content() -> None:
    with pytest.raises(InvalidRequestError, match="the last message has no content") as caught:
        rendered(CHATML, [{"role": "assistant"}], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


# ---------------------------------------------------------------- developer


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "filters"])
def test_a_developer_is_never_dropped(name: str) -> None:
    def prompt(role: str) -> str:
        return rendered(TEMPLATES[name].source, [{"role": role, "content": "Obey."}, {"role": "user", "content": "Hi"}])

    assert "Obey." in prompt("developer")
    if "developer" not in prompt("developer").lower():
        assert prompt("developer") == prompt("system")


def test_a_template_that_knows_developers_gets_them() -> None:
    assert rendered(CHATML, [{"role": "developer", "content": "Obey."}]).startswith("<|im_start|>developer\nObey.")


@pytest.mark.parametrize("otherwise", ["", "{% else %}{{ raise_exception('which role?') }}"])
def test_a_developer_is_refused_if_there_is_no_place_for_system_either(otherwise: str) -> None:
    source = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}"
        + otherwise
        + "{% endif %}{% endfor %}"
    )
    with pytest.raises(InvalidRequestError, match="no place for messages of role 'developer'") as caught:
        rendered(source, [{"role": "developer", "content": "Obey."}, {"role": "user", "content": "Hi"}])
    assert caught.value.param == "messages"


# ---------------------------------------------------------------- calls

CALLS = (
    "{% for message in messages %}{% if message.tool_calls is defined %}"
    "{% for call in message.tool_calls %}{{ call | tojson }}{% endfor %}{% endif %}{% endfor %}"
)


def called(arguments: object, **more: Any) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "assistant", "tool_calls": [call], **more}]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": "ü", "b": [1.5, null]}', {"a": "ü", "b": [1.5, None]}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ("null", {}),
        ("{}", {}),
        (' {"a": {"b": "{}"}} ', {"a": {"b": "{}"}}),
    ],
)
def test_arguments_of_a_call_are_an_object(arguments: object, expected: object) -> None:
    assert json.loads(rendered(CALLS, called(arguments)))["function"] == {"name": "f", "arguments": expected}


def test_a_call_without_arguments_has_none() -> None:
    assert '"arguments": {}' in rendered(CALLS, [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}])


def test_no_calls_are_as_absent() -> None:
    assert rendered("{{ messages[0].keys() | list }}", [{"role": "assistant", "content": "x", "tool_calls": []}]) == (
        "['role', 'content']"
    )


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (called("{a: 1}"), "messages.0.tool_calls: arguments should be a JSON object"),
        (called("[1]"), "messages.0.tool_calls: arguments should be a JSON object"),
        (called([1]), "messages.0.tool_calls: arguments should be a JSON object"),
        (called('"\\ud800"'), "messages.0.tool_calls: arguments should be a JSON object"),
        (called('{"a":' * 100_000), "messages.0.tool_calls: arguments should be a JSON object"),
        ([{"role": "assistant", "tool_calls": {}}], "messages.0.tool_calls: should be a list"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "messages.0.tool_calls: should hold objects with a function"),
        ([{"role": "assistant", "tool_calls": [{"function": "f"}]}], "messages.0.tool_calls: should hold objects"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages.0.tool_calls: should hold objects"),
    ],
)
def test_calls_that_are_none_are_refused(message: list[dict[str, Any]], fault: str) -> None:
    with pytest.raises(InvalidRequestError, match=fault) as caught:
        rendered(CALLS, message)
    assert caught.value.param == "messages" and len(caught.value.message) < 300


@pytest.mark.parametrize("name", sorted(SPECIAL_TOKENS))
def test_special_tokens_are_the_checkpoints(name: str) -> None:
    template = template_of("{{ bos_token }}{{ mood }}{{ messages[0].content }}")
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages, variables={"mood": "calm "}).endswith("calm hi")
    with pytest.raises(InvalidRequestError, match=f"{name} is the checkpoint's") as caught:
        template.render(messages, variables={name: "mine", "mood": ""})
    assert caught.value.param == "chat_template_kwargs"
