"""Tokenizers read from their files, against what transformers reads from the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden.tokenizer_cases import CASES, TEXTS, TOKENIZED_FILE, TokenizerCase, byte_level, unigram

from kvrelay.errors import CheckpointError
from kvrelay.tokenizer.files import read_tokenizer_files
from router.text.tokenizer import TextTokenizer

GOLDEN = json.loads(TOKENIZED_FILE.read_text())["cases"]


@pytest.mark.parametrize("name", CASES)
def test_texts_become_the_tokens_of_transformers(tmp_path: Path, name: str) -> None:
    CASES[name].write(tmp_path)
    tokenizer, golden = TextTokenizer.load(tmp_path), GOLDEN[name]
    for text, ids in zip(TEXTS, golden["ids"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
        assert tokenizer.encode(text) == golden["before"] + ids + golden["after"], repr(text)


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_have_the_names_of_transformers(tmp_path: Path, name: str) -> None:
    CASES[name].write(tmp_path)
    assert read_tokenizer_files(tmp_path).special_tokens == GOLDEN[name]["special_tokens"]


@pytest.mark.parametrize("name", CASES)
def test_tokens_become_the_texts_of_transformers(tmp_path: Path, name: str) -> None:
    CASES[name].write(tmp_path)
    tokenizer, golden = TextTokenizer.load(tmp_path), GOLDEN[name]
    for ids, decoded, shown in zip(golden["ids"], golden["decoded"], golden["shown"], strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == decoded
        assert tokenizer.decode(ids) == shown


def files_of(directory: Path, **settings: Any) -> Path:
    TokenizerCase(byte_level, {"tokenizer_config.json": settings, "config.json": {"model_type": "llama"}}).write(
        directory
    )
    return directory


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"tokenizer_class": "T5TokenizerFast"}, "tokenizer_class 'T5TokenizerFast' is not supported"),
        ({"added_tokens_decoder": {"0": {"content": "<new>"}}}, "'<new>' should have the id 0, but .* it gets 355"),
        ({"added_tokens_decoder": {"355": "<new>"}}, "should hold tokens with their content, not '<new>'"),
        ({"added_tokens_decoder": {"x": {"content": "<new>"}}}, "should have ids"),
        ({"extra_special_tokens": "<new>"}, "extra_special_tokens should be a list or an object, not '<new>'"),
        ({"additional_special_tokens": [7]}, "additional_special_tokens should hold tokens"),
        ({"bos_token": {"text": "<s>"}}, "bos_token should hold tokens"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, "fast_tokenizer_files: only tokenizer.json"),
        ({"chat_template": 7}, "chat_template should be text, not 7"),
        ({"chat_template": [{"name": "default"}]}, "chat_template should list objects with name and template"),
        ({"chat_template": "{% if %}"}, "chat template .* cannot be read"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_its_file(tmp_path: Path, settings: Any, fault: str) -> None:
    with pytest.raises(CheckpointError, match=fault) as caught:
        TextTokenizer.load(files_of(tmp_path, **settings))
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("added_tokens.json", {"<new>": 4000}, "added_tokens.json: token '<new>' should have the id 4000"),
        ("added_tokens.json", {"<new>": None}, "added_tokens.json: added tokens should have ids"),
        ("special_tokens_map.json", [], "special_tokens_map.json is not a JSON object"),
        ("special_tokens_map.json", {"eos_token": {}}, "special_tokens_map.json: eos_token should hold tokens"),
        ("tokenizer.json", {"model": {}}, "tokenizer.json cannot be read"),
    ],
)
def test_older_files_that_do_not_fit_are_refused(tmp_path: Path, name: str, content: Any, fault: str) -> None:
    files_of(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=fault):
        TextTokenizer.load(tmp_path)


def test_a_class_that_needs_merges_is_refused_for_another_model(tmp_path: Path) -> None:
    TokenizerCase(unigram, {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}).write(tmp_path)
    with pytest.raises(CheckpointError, match="model should be BPE, which tokenizer_class needs"):
        TextTokenizer.load(tmp_path)


def test_every_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    CASES["llama2_special_tokens_only_in_their_map"].write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    plain = read_tokenizer_files(tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text("utf-8"), "utf-8-sig")
    marked = read_tokenizer_files(tmp_path)
    assert marked[1:] == plain[1:] and marked.chat_templates.default == "{{ bos_token }}"
    assert marked.tokenizer.to_str() == plain.tokenizer.to_str()


# ---------------------------------------------------------------- chat template


@pytest.mark.parametrize(
    ("setting", "files", "expected"),
    [
        ("own", {}, "own"),
        ([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "own"}], {}, "own"),
        ({"default": "own", "rag": "rag"}, {}, "own"),
        ([{"name": "tool_use", "template": "tools"}], {}, None),
        ("own", {"chat_template.jinja": "file"}, "file"),
        ("own", {"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag"}, "file"),
        ("own", {"additional_chat_templates/default.jinja": "file"}, "file"),
        ("own", {"additional_chat_templates/rag.jinja": "rag"}, None),
        ("own", {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"}, "file"),
        ("own", {"chat_template.json": '{"chat_template": "older"}'}, "own"),
        (None, {"chat_template.json": '{"chat_template": "older"}'}, "older"),
        (None, {}, None),
    ],
)
def test_chat_template_is_found_wherever_it_is(
    tmp_path: Path, setting: Any, files: dict[str, str], expected: str | None
) -> None:
    files_of(tmp_path, chat_template=setting)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    templates = read_tokenizer_files(tmp_path).chat_templates
    assert templates.default == expected
    has_own = "tool_use" in json.dumps([setting, files])
    assert templates.with_tools == ("tools" if has_own else None)
