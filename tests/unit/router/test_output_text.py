from __future__ import annotations

from small_tokenizers import EOS, byte_level, token_id

from kvrelay.tokenizer.token_bytes import TokenBytes
from router.text.output_text import OutputText, TextOptions
from router.text.stop import StopStrings

TOKENIZER = byte_level()
BYTES = TokenBytes(TOKENIZER)


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return found


def letters(text: str) -> list[int]:
    return [token_id(TOKENIZER, letter) for letter in text]


def test_tokens_behind_a_stop_string_are_not_counted() -> None:
    output = OutputText(BYTES, ids("x"), TextOptions(stop=StopStrings(("cd",))))
    delta = output.push(letters("abcdef"))
    assert delta == ("ab", 4, "cd")


def test_the_token_that_stopped_is_shown_on_demand_only() -> None:
    stopped = [*letters("ab"), token_id(TOKENIZER, "c")]
    assert OutputText(BYTES, [], TextOptions()).push(stopped, stopped=True) == ("ab", 3, None)
    assert OutputText(BYTES, [], TextOptions(include_stop=True)).push(stopped, stopped=True) == ("abc", 3, None)
    eos = [*letters("a"), token_id(TOKENIZER, EOS)]
    assert OutputText(BYTES, [], TextOptions()).push(eos, stopped=True) == ("a", 2, None)


def test_stop_string_waits_for_min_tokens() -> None:
    output = OutputText(BYTES, [], TextOptions(stop=StopStrings(("b",)), min_tokens=3))
    assert output.push(letters("abab")) == ("aba", 4, "b")


def test_finish_gives_what_was_held_back() -> None:
    output = OutputText(BYTES, [], TextOptions(stop=StopStrings(("b!",))))
    assert output.push(letters("ab")) == ("a", 2, None)
    assert output.finish() == ("b", 0, None)


def test_stop_string_may_span_tokens_and_skip_special_tokens() -> None:
    output = OutputText(BYTES, [], TextOptions(stop=StopStrings(("ab",))))
    tokens = [*letters("xa"), token_id(TOKENIZER, "<|im_end|>"), *letters("b")]
    assert output.push(tokens) == ("x", 4, "ab")
