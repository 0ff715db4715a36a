"""Guessing ahead: prompt lookup."""

from __future__ import annotations

from decode_node.ngram_index import NgramIndex
from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.speculate import proposer
from kvrelay.config.cluster_config import SpeculativeConfig
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import RequestSpec, SamplingParams


def request(token_ids: list[int]) -> DecodeRequest:
    spec = RequestSpec(
        request_id=RequestId("r"), epoch=1, prompt_token_ids=token_ids, sampling=SamplingParams(max_tokens=100, seed=0)
    )
    return DecodeRequest(spec, [], DecodeStatus.WAITING, 0.0)


def propose(token_ids: list[int], limit: int = 10, **config: object) -> tuple[int, ...] | None:
    settings = SpeculativeConfig.model_validate({"method": "ngram", **config})
    return proposer(settings).propose(request(token_ids), limit)


def test_what_followed_the_newest_tokens_is_guessed() -> None:
    assert propose([1, 2, 3, 4, 5, 9, 1, 2, 3]) == (4, 5, 9, 1)
    assert propose([1, 2, 3, 4, 5, 9, 1, 2, 3], num_speculative_tokens=2) == (4, 5)
    assert propose([1, 2, 3, 4, 5, 9, 1, 2, 3], limit=1) == (4,)


def test_nothing_is_guessed_without_an_earlier_occurrence() -> None:
    assert propose([1, 2, 3, 4, 5]) == ()
    assert propose([1, 9, 1], ngram_min=2) == ()
    assert propose([1]) == ()


def test_the_longest_run_and_then_its_latest_occurrence_wins() -> None:
    assert propose([7, 1, 2, 8, 5, 1, 2, 6, 7, 1, 2], num_speculative_tokens=1) == (8,)
    assert propose([1, 2, 8, 1, 2, 6, 9, 1, 2], num_speculative_tokens=1) == (6,)


def test_a_run_that_overlaps_itself_is_found() -> None:
    assert propose([5, 5, 5, 5], num_speculative_tokens=2) == (5,)


def test_the_index_grows_with_the_sequence_as_if_built_at_once() -> None:
    tokens = [(index * index) % 7 for index in range(60)]
    growing = NgramIndex(1, 3)
    for end in range(1, len(tokens) + 1):
        assert growing.find(tokens[:end]) == NgramIndex(1, 3).find(tokens[:end])


def test_none_takes_plain_steps_and_naive_guesses_nothing() -> None:
    one = request([1, 2, 1, 2])
    assert proposer(SpeculativeConfig(method="none")).propose(one, 4) is None
    assert proposer(SpeculativeConfig(method="naive")).propose(one, 4) == ()
