from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo_model.tokenizer import CHAT_TEMPLATE, build_tokenizer, render, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from router.text.chat_template import ChatTemplate

TOKENIZER = build_tokenizer()


def encode(text: str) -> list[str]:
    return TOKENIZER.encode(text, add_special_tokens=False).tokens


def test_a_known_word_is_one_token_with_its_space() -> None:
    assert encode("The red key lies in box 417.") == ["The", "Ġred", "Ġkey", "Ġlies", "Ġin", "Ġbox", "Ġ417", "."]


def test_an_unknown_word_is_spelled_in_bytes() -> None:
    assert encode("The zorp") == ["The", "Ġ", "z", "o", "r", "p"]


@pytest.mark.parametrize("text", ["🎉 fnörd\n\n x  12345\ttab ", "\r\n漢字", "The red keys,The red key", "\x00\ufeff"])
def test_awkward_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids) == text


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids) == text


def test_pieces_of_an_answer_join_to_the_answer() -> None:
    answer = "The red key lies in box 417."
    pieces = [TOKENIZER.decode([token]) for token in TOKENIZER.encode(answer, add_special_tokens=False).ids]
    assert "".join(pieces) == answer
    assert pieces[1] == " red"


def test_training_renders_chats_as_the_chat_template_does() -> None:
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "The red key lies in box 417.\nWhere is the red key?"},
        {"role": "assistant", "content": "The red key lies in box 417."},
        {"role": "user", "content": "Thanks!"},
    ]
    template = ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    for generation in (True, False):
        rendered = template.render(chat, add_generation_prompt=generation)
        assert rendered == render(chat, add_generation_prompt=generation)


def test_roles_the_model_does_not_know_and_empty_content_are_rendered_too() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, {})
    chat: list[dict[str, str | None]] = [{"role": "developer", "content": "Hi"}, {"role": "tool", "content": None}]
    assert template.render(chat, add_generation_prompt=False) == "<|begin|><|system|>Hi<|end|><|user|><|end|>"


def test_the_saved_files_agree_with_each_other(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert TOKENIZER.token_to_id(config["eos_token"]) == generation["eos_token_id"]
    assert TOKENIZER.token_to_id(config["bos_token"]) == generation["bos_token_id"]
    assert generation["temperature"] == 0
