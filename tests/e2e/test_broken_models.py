"""Checkpoints with a flaw: whoever meets it gets a typed error, and the others the tokens of a sound model.

One model has all of them: an embedding that is infinite, a token that only the tokenizer has, and an end of text beyond
the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.asking import Answer, Ask, Asker, answers, at_once, play
from support.broken_checkpoint import add_token, break_embedding, change_json
from support.cluster import Cluster, running
from support.cluster_config import EOS_TOKEN_ID, VOCAB_SIZE, cluster_config, d, m, p

from kvrelay.engine.tiny import write_tiny_checkpoint

BROKEN = 300
PAD = "<|late_pad|>"
NODES = {"1p1d": [p(), d()], "mixed": [m()]}
FAILED = (500, "engine_error")


def write_model(path: Path, *, flawed: bool) -> Path:
    write_tiny_checkpoint(path, "llama")
    if flawed:
        break_embedding(path, BROKEN)
        assert add_token(path, PAD) == VOCAB_SIZE
        change_json(path, "generation_config.json", eos_token_id=[EOS_TOKEN_ID, VOCAB_SIZE + 7])
    return path


def prompts(count: int = 11) -> list[list[int]]:
    """Return prompts of sound tokens; most begin alike."""
    rng = random.Random(5)
    common = [rng.randrange(BROKEN) for _ in range(40)]
    return [
        (common if number % 3 else []) + [rng.randrange(BROKEN) for _ in range(rng.randint(1, 60))]
        for number in range(count)
    ]


def neighbours() -> list[Ask]:
    """Return requests that have nothing to do with any flaw, greedy and sampled."""
    # Nobody may sample the broken token, whose turn comes in a random model as often as any other's.
    more: dict[str, Any] = {"logit_bias": {str(BROKEN): -100}, "logprobs": 2}
    return [Ask(prompt, 12, 0.9 if number % 2 else 0.0, number, more=more) for number, prompt in enumerate(prompts())]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of the neighbours from a model without flaws, on a mixed node."""
    model = write_model(tmp_path_factory.mktemp("sound"), flawed=False)
    with running(cluster_config(model, *NODES["mixed"], cache={"num_blocks": 256})) as cluster:
        return [answer.token_ids for answer in answers(cluster, neighbours())]


@pytest.fixture(scope="module", params=list(NODES))
def flawed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = write_model(tmp_path_factory.mktemp("flawed"), flawed=True)
    with running(cluster_config(model, *NODES[request.param], cache={"num_blocks": 256})) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def quiescent(flawed: Cluster) -> Iterator[None]:
    yield
    flawed.wait_until_quiescent()


def among_neighbours(cluster: Cluster, path: str, *bodies: dict[str, Any]) -> tuple[list[Answer], list[Answer]]:
    """Return the answers to the neighbours and to ``bodies``, all asked at once, the latter in between."""

    async def scenario(asker: Asker) -> list[Answer]:
        jobs = [lambda ask=ask: asker.ask(ask) for ask in neighbours()]
        for number, body in enumerate(bodies):
            jobs.insert(2 * number + 1, lambda body=body: asker.post(path, {"model": "demo", **body}))
        return await at_once(len(jobs), jobs)

    given = play(cluster, scenario)
    special = [given.pop(number + 1) for number in range(len(bodies))]
    return given, special


def test_an_infinite_embedding_fails_the_requests_that_have_it(flawed: Cluster, sound: list[list[int]]) -> None:
    """At the end of a prompt, within one, at its beginning, behind a prefix that others share."""
    shared = prompts()[1][:40]
    bodies = [
        {"prompt": prompt, "request_id": f"bad-{number}", "max_tokens": 8}
        for number, prompt in enumerate(([BROKEN], [BROKEN, *shared], [*shared, BROKEN], [*shared, BROKEN, *shared]))
    ]
    for _ in range(2):  # the second time with everything in the prefix caches that ever gets there
        given, failed = among_neighbours(flawed, "/v1/completions", *bodies)
        assert [answer.token_ids for answer in given] == sound
        assert [answer.end for answer in failed] == [FAILED] * len(bodies)
        for answer in failed:
            assert "not finite" in answer.body["error"]["message"]
            assert "cmpl" not in answer.body["error"]["message"]


def test_a_model_that_samples_the_infinite_embedding_fails_at_the_next_token(
    flawed: Cluster, sound: list[list[int]]
) -> None:
    """The first logits that are not finite are those of D, or come after a hand-off."""
    body = {"prompt": prompts()[0], "logit_bias": {str(BROKEN): 100}, "temperature": 0, "max_tokens": 5}
    given, [failed] = among_neighbours(flawed, "/v1/completions", body)
    assert [answer.token_ids for answer in given] == sound
    assert failed.end == FAILED
    assert failed.body["error"]["message"] == "the model's logits are not finite at output position 1"


@pytest.mark.fault("F04")
def test_all_choices_of_a_request_that_fail_are_one_error(flawed: Cluster, sound: list[list[int]]) -> None:
    body = {"prompt": [7, BROKEN, 8], "n": 5, "temperature": 1.0, "max_tokens": 5}
    given, [failed] = among_neighbours(flawed, "/v1/completions", body)
    assert [answer.token_ids for answer in given] == sound
    assert failed.end == FAILED


def test_a_stream_that_fails_ends_with_its_error(flawed: Cluster) -> None:
    body = {"model": "demo", "prompt": [7, 8], "logit_bias": {str(BROKEN): 100}, "temperature": 0, "max_tokens": 5}
    parts = play(flawed, lambda asker: asker.stream("/v1/completions", body))
    assert [part["error"]["code"] for part in parts if "error" in part] == ["engine_error"]


def test_a_text_with_a_token_that_the_model_does_not_have_is_refused(flawed: Cluster, sound: list[list[int]]) -> None:
    given, refused = among_neighbours(
        flawed, "/v1/completions", {"prompt": f"Hello {PAD} you"}, {"prompt": ["fine", PAD]}, {"prompt": [VOCAB_SIZE]}
    )
    assert [answer.token_ids for answer in given] == sound
    assert [(answer.status, answer.body["error"]["param"]) for answer in refused] == [(400, "prompt")] * 3
    assert f"'{PAD}' is token {VOCAB_SIZE}" in refused[0].body["error"]["message"]
    talk = {"messages": [{"role": "user", "content": f"Hi {PAD}"}]}
    _, [chat] = among_neighbours(flawed, "/v1/chat/completions", talk)
    assert (chat.status, chat.body["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_with_an_end_of_text_beyond_the_vocabulary(
    flawed: Cluster, sound: list[list[int]], temperature: float
) -> None:
    body = {
        "prompt": prompts()[3],
        "min_tokens": 6,
        "max_tokens": 9,
        "temperature": temperature,
        "logit_bias": {str(BROKEN): -100, str(EOS_TOKEN_ID): 50},
        "return_token_ids": True,
    }
    given, [answer] = among_neighbours(flawed, "/v1/completions", body)
    assert [answer.token_ids for answer in given] == sound
    assert answer.status == 200
    assert len(answer.token_ids) == 7 and answer.token_ids[-1] == EOS_TOKEN_ID
    assert EOS_TOKEN_ID not in answer.token_ids[:6]


def test_the_end_of_text_beyond_the_vocabulary_is_told_in_the_log(flawed: Cluster) -> None:
    assert flawed.log().count("eos_token_id beyond the vocabulary") == 1


@pytest.mark.parametrize(
    "extreme",
    [
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 100},
        {"temperature": 1e-300},
        {"temperature": 1e-5, "logprobs": 5},
        {"min_tokens": 4, "logprobs": 5},
    ],
)
def test_extreme_sampling_parameters_fail_nothing(flawed: Cluster, extreme: dict[str, Any]) -> None:
    body = {"model": "demo", "prompt": prompts()[2], "max_tokens": 6, "logit_bias": {str(BROKEN): -100}, **extreme}
    answer = play(flawed, lambda asker: asker.post("/v1/completions", body))
    assert answer.status == 200, answer.body
