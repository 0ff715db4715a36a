from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import EOS, byte_level, sentencepiece_like, token_id
from tokenizers import Tokenizer

from kvrelay.tokenizer.token_bytes import TokenBytes
from router.text.detokenizer import Detokenizer, decode

BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece_like()
BYTES = {id(tokenizer): TokenBytes(tokenizer) for tokenizer in (BYTE_LEVEL, SENTENCEPIECE)}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["Hello world", "naïve café 😀👨‍👩‍👧🇩🇪", "你好，世界。", "  the  the", "\n\n  x\t", "data: [DONE]\n\n"]
)
IDS = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=30)


def pieces(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(BYTES[id(tokenizer)], prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(output_id) for output_id in output), detokenizer.finish()]


@pytest.mark.fault("F25")
@settings(max_examples=200, deadline=None)
@given(prompt=IDS, output=IDS, skip=st.booleans())
def test_byte_level_deltas_make_the_full_decode_of_any_ids(prompt: list[int], output: list[int], skip: bool) -> None:
    text = "".join(pieces(BYTE_LEVEL, prompt, output, skip=skip))
    assert text == BYTE_LEVEL.decode(output, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(prompt=TEXT, output=TEXT)
def test_sentencepiece_deltas_continue_the_prompt(prompt: str, output: str) -> None:
    prompt_ids = SENTENCEPIECE.encode(prompt).ids
    ids = SENTENCEPIECE.encode(output, add_special_tokens=False).ids
    before, after = SENTENCEPIECE.decode(prompt_ids), SENTENCEPIECE.decode(prompt_ids + ids)
    assert before + "".join(pieces(SENTENCEPIECE, prompt_ids, ids)) == after


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte_level", "sentencepiece"])
@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_no_replacement_character_for_what_becomes_complete(tokenizer: Tokenizer, text: str) -> None:
    if "\ufffd" in text:
        return
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert not any("\ufffd" in piece for piece in pieces(tokenizer, [], ids))


@pytest.mark.fault("F25")
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte_level", "sentencepiece"])
def test_emoji_comes_with_its_last_token(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the", add_special_tokens=False).ids
    ids = tokenizer.encode("the🦊", add_special_tokens=False).ids[len(prompt) :]
    assert len(ids) > 1
    assert pieces(tokenizer, prompt, ids) == [*[""] * (len(ids) - 1), "🦊", ""]


def test_first_sentencepiece_word_keeps_its_space_only_behind_a_visible_prompt() -> None:
    bos, the = token_id(SENTENCEPIECE, "<s>"), token_id(SENTENCEPIECE, "▁the")
    assert pieces(SENTENCEPIECE, [bos], [the, the]) == ["the", " the", ""]
    assert pieces(SENTENCEPIECE, [bos, the], [the]) == [" the", ""]


@pytest.mark.fault("F25")
def test_byte_fallback_run_that_is_no_utf8_neither_raises_nor_swallows() -> None:
    byte = {value: token_id(SENTENCEPIECE, f"<0x{value:02X}>") for value in (0xE2, 0x82, 0xAC, 0xFF)}
    the = token_id(SENTENCEPIECE, "▁the")
    run = [byte[0xE2], byte[0x82], byte[0xAC], byte[0xFF], byte[0xE2], the]
    assert pieces(SENTENCEPIECE, [the], run) == ["", "", "€", "\ufffd", "", "\ufffd the", ""]


def test_character_that_never_completes_ends_as_one_replacement_character() -> None:
    first = BYTE_LEVEL.encode("🦊", add_special_tokens=False).ids[0]
    assert pieces(BYTE_LEVEL, [], [first]) == ["", "\ufffd"]


def test_special_tokens_are_shown_on_demand_only() -> None:
    ids = [token_id(BYTE_LEVEL, EOS), token_id(BYTE_LEVEL, "a")]
    assert decode(BYTES[id(BYTE_LEVEL)], ids) == "a"
    assert decode(BYTES[id(BYTE_LEVEL)], ids, skip_special_tokens=False) == f"{EOS}a"
