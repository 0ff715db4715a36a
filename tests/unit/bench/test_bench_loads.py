"""Loads and arrivals: seeded, with the lengths and prefixes asked for; files that are wrong are refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from kvrelay.bench.arrivals import arrival_times
from kvrelay.bench.errors import BenchError
from kvrelay.bench.loads import Lengths, MooncakeLoad, RandomLoad, ShareGPTLoad
from kvrelay.bench.prompts import TokenIdPrompts, TokenizedTextPrompts, WordPrompts, plain_token_ids, read_tokenizer

IDS = TokenIdPrompts(range(100))


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


# ---------------------------------------------------------------- arrivals


def test_arrivals_are_those_of_the_seed_and_end_at_count_over_rate() -> None:
    times = arrival_times(500, 20.0, 1.0, seed=7)

    assert times == arrival_times(500, 20.0, 1.0, seed=7) != arrival_times(500, 20.0, 1.0, seed=8)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(25.0)


@pytest.mark.parametrize(("burstiness", "variation"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_burstiness_is_the_shape_of_the_gamma_distribution_of_gaps(burstiness: float, variation: float) -> None:
    gaps = np.diff(arrival_times(20_000, 10.0, burstiness, seed=1))

    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_an_infinite_burstiness_means_equal_gaps_and_an_infinite_rate_none() -> None:
    assert [b - a for a, b in pairwise(arrival_times(9, 4.0, math.inf, 0))] == pytest.approx([0.25] * 8)
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0] * 3


# ---------------------------------------------------------------- random


def test_random_lengths_are_within_the_range_and_reach_its_ends() -> None:
    load = RandomLoad(2000, Lengths(100, 0.25), Lengths(10, 0.5))
    turns = [conversation.turns[0] for conversation in load.conversations(IDS, 3)]

    assert {len(turn.content) for turn in turns} == set(range(75, 126))
    assert {turn.max_tokens for turn in turns} == set(range(5, 16))
    assert all(turn.num_tokens == len(turn.content) for turn in turns)


def test_a_load_is_that_of_its_seed_and_no_two_prompts_are_alike() -> None:
    load = RandomLoad(50, Lengths(20), Lengths(4))

    assert load.conversations(IDS, 1) == load.conversations(IDS, 1)
    contents = [str(c.turns[0].content) for seed in (1, 2) for c in load.conversations(IDS, seed)]
    assert len(set(contents)) == 100


def test_a_shared_prefix_begins_each_prompt() -> None:
    load = RandomLoad(10, Lengths(20), Lengths(4), prefix_tokens=8)
    prompts = [conversation.turns[0].content for conversation in load.conversations(IDS, 1)]

    assert len({str(prompt[:8]) for prompt in prompts}) == 1
    assert len({str(prompt[8:]) for prompt in prompts}) == 10
    assert {len(prompt) for prompt in prompts} == {28}


def test_chats_have_turns_a_shared_system_text_and_pauses() -> None:
    load = RandomLoad(20, Lengths(5), Lengths(4), num_turns=3, prefix_tokens=6, mean_pause_s=2.0)
    chats = load.conversations(WordPrompts(1.0), 1)

    assert {len(chat.turns) for chat in chats} == {3}
    assert len({chat.system for chat in chats}) == 1
    assert len(str(chats[0].system).split()) == 6
    assert len({turn.content for chat in chats for turn in chat.turns}) == 60
    assert all(chat.pause_s > 0 for chat in chats)


# ---------------------------------------------------------------- prompts


def test_texts_of_a_tokenizer_have_the_tokens_asked_for() -> None:
    tokenizer = word_tokenizer()
    maker = TokenizedTextPrompts(tokenizer, plain_token_ids(tokenizer, None))
    text = maker.part("a", 40)

    assert isinstance(text, str)
    assert maker.count(text) == 40
    assert text == maker.part("a", 40) != maker.part("b", 40)


def test_special_tokens_and_those_beyond_the_vocabulary_are_never_drawn() -> None:
    assert plain_token_ids(word_tokenizer(), None) == list(range(50))
    assert plain_token_ids(word_tokenizer(), 10) == list(range(10))


def test_words_are_as_many_as_make_the_tokens() -> None:
    text = WordPrompts(2.0).part("a", 100)

    assert len(str(text).split()) == 50


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)


# ---------------------------------------------------------------- ShareGPT


def _sharegpt(tmp_path: Path, *chats: list[tuple[str, int]]) -> Path:
    def message(sender: str, length: int, number: int) -> dict[str, str]:
        return {"from": sender, "value": " ".join([f"w{number % 50}"] * length)}

    data = [{"conversations": [message(*part, number) for part in chat]} for number, chat in enumerate(chats)]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([*data, {"id": "no conversation"}, "nonsense"]))
    return path


@pytest.fixture
def maker() -> TokenizedTextPrompts:
    tokenizer = word_tokenizer()
    return TokenizedTextPrompts(tokenizer, plain_token_ids(tokenizer, None))


def test_sharegpt_prompts_and_lengths_are_those_of_the_file(tmp_path: Path, maker: TokenizedTextPrompts) -> None:
    path = _sharegpt(
        tmp_path,
        [("human", 12), ("gpt", 7), ("human", 5), ("gpt", 5)],
        [("human", 3), ("gpt", 50)],  # the prompt is too short
        [("human", 1025), ("gpt", 50)],  # too long
        [("human", 1000), ("gpt", 1049)],  # too long with its answer
        [("human", 20), ("gpt", 3)],  # the answer is too short
        [("human", 20)],
    )
    conversations = ShareGPTLoad(path, 3).conversations(maker, 1)

    assert len(conversations) == 3
    assert {(c.turns[0].num_tokens, c.turns[0].max_tokens) for c in conversations} == {(12, 7)}
    assert {len(c.turns) for c in conversations} == {1}


def test_sharegpt_chats_have_their_turns_and_a_system_message_is_none(
    tmp_path: Path, maker: TokenizedTextPrompts
) -> None:
    path = _sharegpt(tmp_path, [("system", 9), ("human", 12), ("gpt", 7), ("human", 5), ("gpt", 6), ("human", 8)])
    [chat] = ShareGPTLoad(path, 1, max_turns=5, output_tokens=33).conversations(maker, 1)

    assert [(turn.num_tokens, turn.max_tokens) for turn in chat.turns] == [(12, 33), (5, 33)]


@pytest.mark.parametrize("text", ["{}", "[", "[]"])
def test_a_file_that_is_not_sharegpts_is_refused(tmp_path: Path, maker: TokenizedTextPrompts, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)

    with pytest.raises(BenchError, match=r"x\.json"):
        ShareGPTLoad(path, 1).conversations(maker, 1)


# ---------------------------------------------------------------- Mooncake


def _trace(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return path


def _entry(timestamp: float, input_length: int, hash_ids: list[int]) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": input_length, "output_length": 9, "hash_ids": hash_ids}


def test_prompts_of_a_trace_share_the_prefixes_of_their_hash_ids(tmp_path: Path) -> None:
    path = _trace(tmp_path, _entry(500, 1200, [1, 2, 3]), _entry(900, 1100, [1, 2, 4]), _entry(1500, 700, [5, 2]))
    first, second, third = (c.turns[0].content for c in MooncakeLoad(path).conversations(IDS, 1))

    assert [len(first), len(second), len(third)] == [1200, 1100, 700]
    assert first[:1024] == second[:1024]
    assert first[1024:1100] != second[1024:1100]
    assert third[:512] != first[:512]
    assert third[512:700] == first[512:700]  # the same id, cut


def test_a_trace_has_its_times_scaled(tmp_path: Path) -> None:
    path = _trace(tmp_path, _entry(500, 1200, [1, 2, 3]), _entry(900, 1100, [1, 2, 4]), _entry(1500, 700, [5, 2]))
    load = MooncakeLoad(path, count=2, speedup=2.0, length_scale=0.1)
    conversations = load.conversations(IDS, 1)

    assert [c.start_s for c in conversations] == pytest.approx([0.0, 0.2])
    assert [(len(c.turns[0].content), c.turns[0].max_tokens) for c in conversations] == [(120, 1), (110, 1)]
    first, second = (c.turns[0].content for c in conversations)
    assert first[:102] == second[:102]


def test_tokens_without_a_hash_id_are_of_that_prompt_only(tmp_path: Path) -> None:
    path = _trace(tmp_path, _entry(0, 600, [1]), _entry(1, 600, [1]))
    first, second = (c.turns[0].content for c in MooncakeLoad(path).conversations(IDS, 1))

    assert first[:512] == second[:512]
    assert first[512:] != second[512:]


@pytest.mark.parametrize("line", ["{}", "7", "no json", '{"timestamp": "x", "input_length": 1, "output_length": 1}'])
def test_a_line_that_is_no_request_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(_entry(0, 10, [1])) + "\n" + line + "\n")

    with pytest.raises(BenchError, match=r"trace\.jsonl:2: "):
        MooncakeLoad(path).conversations(IDS, 1)


def test_a_file_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be read"):
        MooncakeLoad(tmp_path / "none").conversations(IDS, 1)
    with pytest.raises(BenchError, match="empty"):
        MooncakeLoad(_trace(tmp_path)).conversations(IDS, 1)
