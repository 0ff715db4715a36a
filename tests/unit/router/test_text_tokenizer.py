from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import BOS, EOS, IM_END, IM_START, byte_level, sentencepiece_like, token_id
from support.broken_checkpoint import add_token
from tokenizers import Tokenizer, processors

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import CheckpointError, InvalidRequestError
from router.model import load_model
from router.openai.chat import ChatCompletions
from router.openai.completions import Completions
from router.openai.schemas import ChatCompletionRequest, ChatMessage, CompletionRequest
from router.text.chat_template import ChatTemplate
from router.text.plain_tokenizer import plain_tokenizer
from router.text.tokenizer import TextTokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "The answer is "},
]


# ---------------------------------------------------------------- chat template


def test_chatml() -> None:
    template = ChatTemplate(CHATML, {})
    assert template.render(TALK[:2]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not template.render(TALK[:2], add_generation_prompt=False).endswith("assistant\n")


def test_final_message_is_left_open() -> None:
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert ChatTemplate(CHATML, {}).render(TALK, **options).endswith("<|im_start|>assistant\nThe answer is ")
    trimming = CHATML.replace("message['content']", "message['content'] | trim")
    assert ChatTemplate(trimming, {}).render(TALK, **options).endswith("<|im_start|>assistant\nThe answer is")
    blind = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="does not show the last message"):
        ChatTemplate(blind, {}).render(TALK, **options)


def test_what_templates_expect_is_there() -> None:
    source = (
        "{{ bos_token }}{% if tools is not none %}tools{% endif %}"
        "{%- for message in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{{ message | tojson }}{% endfor %}"
        "{% generation %}{{ strftime_now('%Y') | length }}{% endgeneration %}{{ extra }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    messages = [{"role": "user", "content": "<ä>"}, {"role": "user", "content": "never"}]
    assert template.render(messages, variables={"extra": "!"}) == '<s>{"role": "user", "content": "<ä>"}4!'


def test_variables_of_a_client_replace_neither_messages_nor_the_prompt() -> None:
    template = ChatTemplate(CHATML, {})
    variables = {"messages": [], "add_generation_prompt": False}
    assert template.render(TALK[:1], variables=variables).endswith("assistant\n")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['nothing'] + 'x' }}",
        "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}",
        "{{ 1 / 0 if messages else 0 }}",
    ],
)
def test_what_goes_wrong_in_a_template_is_told_to_the_client(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat template refuses") as caught:
        ChatTemplate(source, {}).render(TALK)
    assert caught.value.param == "messages"


# ---------------------------------------------------------------- tokenizer


def test_special_tokens_around_a_text_are_those_of_the_file() -> None:
    tokenizer = TextTokenizer(sentencepiece_like(), {"bos_token": BOS, "eos_token": EOS})
    bare = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the") == [token_id(sentencepiece_like(), BOS), *bare]
    assert tokenizer.eos_token_id == token_id(sentencepiece_like(), EOS)


def test_special_tokens_spelled_out_count_as_such() -> None:
    tokenizer = TextTokenizer(byte_level(), {}, CHATML)
    text = tokenizer.render_chat(TALK[:2])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [ids.count(token_id(byte_level(), token)) for token in (IM_START, IM_END)] == [3, 2]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_truncation_and_padding_of_the_file_are_not_applied() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    assert len(TextTokenizer(tokenizer, {}).encode("The quick brown fox jumps")) > 2
    assert len(TextTokenizer(tokenizer, {}).encode("x")) == 1


def test_plain_tokenizer_has_bytes_and_names() -> None:
    tokenizer = plain_tokenizer(300)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("Hé")) == 3
    assert tokenizer.decode([*tokenizer.encode("Hé"), 299, 1000]) == "Hé t299"
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "user: x\nassistant: "


# ---------------------------------------------------------------- checkpoint


def write(model_dir: Path, **files: dict[str, Any]) -> None:
    byte_level().save(str(model_dir / "tokenizer.json"))
    for name, content in {"config": {"vocab_size": 500, "max_position_embeddings": 64}, **files}.items():
        (model_dir / f"{name}.json").write_text(json.dumps(content))


def cluster(model_dir: Path, **model: object) -> ClusterConfig:
    return ClusterConfig.from_data(
        {
            "model": {"path": str(model_dir), **model},
            "nodes": [{"name": "m0", "role": "mixed", "port": 1}],
        }
    )


def test_model_tells_its_ends_its_defaults_and_its_length(tmp_path: Path) -> None:
    write(
        tmp_path,
        config={"vocab_size": 500, "max_position_embeddings": 64, "eos_token_id": 7},
        generation_config={"eos_token_id": [9, 7], "temperature": 0.6, "top_k": 20, "do_sample": True},
        tokenizer_config={"eos_token": EOS},
    )
    model = load_model(cluster(tmp_path))
    assert model.eos_token_ids == (9, 7, token_id(byte_level(), EOS))
    assert model.default_sampling == {"temperature": 0.6, "top_k": 20}
    assert (model.vocab_size, model.max_model_len, model.name) == (500, 64, tmp_path.name)
    assert load_model(cluster(tmp_path, max_model_len=32)).max_model_len == 32


def test_chat_template_of_its_own_file_goes_before_the_configs(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    write(tmp_path, tokenizer_config={"chat_template": [{"name": "default", "template": "in config"}]})
    assert load_model(cluster(tmp_path)).tokenizer.render_chat(messages) == "in config"
    (tmp_path / "chat_template.jinja").write_text("in file")
    assert load_model(cluster(tmp_path)).tokenizer.render_chat(messages) == "in file"


def test_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        load_model(cluster(tmp_path)).tokenizer.render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("config.json", None, "cannot read"),
        ("config.json", "[]", "is not a JSON object"),
        ("generation_config.json", "{", "is not JSON"),
    ],
)
def test_damaged_checkpoint_is_told_with_its_file(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    write(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(cluster(tmp_path))
    assert str(tmp_path) in caught.value.message


# ---------------------------------------------------------------- tokens that the model does not have


def with_pad_token(model_dir: Path, **files: dict[str, Any]) -> int:
    """Write a checkpoint whose tokenizer has one token more than the model; return its id."""
    size = byte_level().get_vocab_size()
    write(model_dir, config={"vocab_size": size, "max_position_embeddings": 64}, **files)
    return add_token(model_dir, "<pad>")


@pytest.mark.parametrize("eos", [[7, 500, -1, 1 << 40], 500, -1])
def test_ends_of_text_beyond_the_vocabulary_are_left_out_and_told_once(
    tmp_path: Path, eos: object, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, generation_config={"eos_token_id": eos}, tokenizer_config={"eos_token": EOS})
    model = load_model(cluster(tmp_path))
    of_tokenizer = token_id(byte_level(), EOS)
    assert model.eos_token_ids == ((7, of_tokenizer) if isinstance(eos, list) else (of_tokenizer,))
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "eos_token_id beyond the vocabulary" in warning and "vocab_size=500" in warning


def test_ends_of_text_that_the_model_has_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, generation_config={"eos_token_id": [0, 499]})
    assert load_model(cluster(tmp_path)).eos_token_ids == (0, 499)
    assert not caplog.records


def test_the_tokenizers_own_end_of_text_may_be_beyond_the_vocabulary(tmp_path: Path) -> None:
    with_pad_token(tmp_path, tokenizer_config={"eos_token": "<pad>"})
    assert load_model(cluster(tmp_path)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"eos_token_id": "7"}, "eos_token_id should be a token id or a list of them, not '7'"),
        ({"eos_token_id": [7, None]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"temperature": "hot"}, "temperature should be a number, not 'hot'"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty should be a number, not nan"),
        ({"top_k": [1]}, "top_k should be a number"),
    ],
)
def test_what_a_checkpoint_says_of_sampling_is_checked_when_it_is_loaded(
    tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    write(tmp_path, generation_config=content)
    with pytest.raises(CheckpointError, match=f"generation_config.json: {re.escape(said)}"):
        load_model(cluster(tmp_path))


def test_a_tokenizer_that_adds_an_unknown_token_to_every_text_is_refused(tmp_path: Path) -> None:
    unknown = with_pad_token(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = processors.TemplateProcessing("<pad> $A", special_tokens=[("<pad>", unknown)])
    tokenizer.save(file)
    with pytest.raises(CheckpointError, match=f"adds .*<pad>.*{unknown}.* to every text"):
        load_model(cluster(tmp_path))


@pytest.mark.parametrize("prompt", ["a <pad> b", ["fine", "<pad>"]])
def test_a_text_with_a_token_that_the_model_does_not_have_is_refused(tmp_path: Path, prompt: Any) -> None:
    unknown = with_pad_token(tmp_path)
    model = load_model(cluster(tmp_path))
    with pytest.raises(InvalidRequestError, match=f"prompt: '<pad>' is token {unknown} of the tokenizer") as caught:
        Completions(model).prompts(CompletionRequest(prompt=prompt), 512)
    assert caught.value.param == "prompt" and f"only {unknown} tokens" in caught.value.message
    assert Completions(model).prompts(CompletionRequest(prompt="a b"), 512) == [model.tokenizer.encode("a b")]


def test_a_chat_with_a_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    with_pad_token(tmp_path, tokenizer_config={"chat_template": CHATML})
    chats = ChatCompletions(load_model(cluster(tmp_path)))
    fine, bad = (ChatMessage(role="user", content=text) for text in ("hi", "hi <pad>"))
    assert chats.prompts(ChatCompletionRequest(messages=[fine]), 512)
    with pytest.raises(InvalidRequestError, match="messages: '<pad>' is token") as caught:
        chats.prompts(ChatCompletionRequest(messages=[fine, bad]), 512)
    assert caught.value.param == "messages"


def test_a_model_with_more_embeddings_than_the_tokenizer_has_tokens_is_common(tmp_path: Path) -> None:
    write(tmp_path)
    model = load_model(cluster(tmp_path))
    assert model.vocab_size == 500 > byte_level().get_vocab_size()
    assert Completions(model).prompts(CompletionRequest(prompt=[499]), 512) == [[499]]
