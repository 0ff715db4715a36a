"""Logprobs of prompt tokens: those of the same tokens as output, whatever the chunks, and in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from engine_runs import KERNELS, Runner, open_engine, outcomes_in_order, plan_of, sequence, use_kernels
from support.broken_checkpoint import set_weights

from kvrelay.engine import prompt_logprobs
from kvrelay.engine.device.operations import MOST_LOGPROBS
from kvrelay.engine.interface import Engine
from kvrelay.engine.paddle_engine import PaddleEngine
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.node.plans import Chunk
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed
from kvrelay.protocol.request import PromptLogprobs, Sequence, TokenLogprobs

VOCAB_SIZE = 384
LENGTHS = (1, 2, 17, 40, 90)


@pytest.fixture(params=[*KERNELS, "torch", "paddle-device"])
def sections(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a config says for each kind of kernels, and for the engines of devices."""
    if request.param in KERNELS:
        return {"engine": {"kernels": use_kernels(request.param, monkeypatch)}}
    if request.param == "torch":
        pytest.importorskip("torch", reason="kvrelay[torch] is not installed")
    return {"engine": {"kind": request.param}, "model": {"dtype": "float32"}}


@pytest.fixture
def engine(tiny_dir: Path, sections: dict[str, Any]) -> Iterator[Engine]:
    loaded = open_engine(tiny_dir, **sections)
    yield loaded
    loaded.close()


class Entry(NamedTuple):
    """What is said of one prompt token."""

    token: int
    rank: int
    top_token_ids: list[int]
    logprobs: list[float]
    """Its own, then those of the alternatives."""


def prompt(length: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist()
    return tokens


def scored(length: int, alternatives: int = 3, **sampling: Any) -> Sequence:
    return sequence(prompt(length), f"r{length}", max_tokens=1, num_prompt_logprobs=alternatives, **sampling)


def entries(pieces: list[PromptLogprobs]) -> list[Entry]:
    """Return what ``pieces`` say, which must be in order and without a gap."""
    found: list[Entry] = []
    for piece in pieces:
        assert piece.start == len(found) + 1
        ranks, ids = np.frombuffer(piece.ranks, "<i4"), np.frombuffer(piece.token_ids, "<i4")
        rows = zip(
            ranks.tolist(),
            ids.reshape(len(ranks), -1).tolist(),
            np.frombuffer(piece.logprobs, "<f8").reshape(len(ranks), -1).tolist(),
            strict=True,
        )
        found += [Entry(token, rank, tops, logprobs) for rank, (token, *tops), logprobs in rows]
        assert piece.end == len(found) + 1
    return found


def run(engine: Engine, sequences: list[Sequence], chunk: int = 1 << 30) -> list[list[Entry]]:
    """Compute the prompts together, in chunks; return what is said of each."""
    runner = Runner(engine)
    pieces: dict[Sequence, list[PromptLogprobs]] = {one: [] for one in sequences}
    while running := [one for one in sequences if not one.num_output_tokens]:
        steps = [(one, min(chunk, one.num_tokens - one.num_computed_tokens)) for one in running]
        for one, sampled in zip(running, runner.run(*steps), strict=True):
            pieces[one] += sampled.prompt_logprobs
    return [entries(pieces[one]) for one in sequences]


def assert_close(left: list[Entry], right: list[Entry]) -> None:
    assert [(one.token, one.rank, one.top_token_ids) for one in left] == [
        (one.token, one.rank, one.top_token_ids) for one in right
    ]
    np.testing.assert_allclose([one.logprobs for one in left], [one.logprobs for one in right], atol=1e-4)


def test_they_are_those_of_the_same_tokens_as_output(engine: Engine) -> None:
    runner = Runner(engine)
    generated = sequence(prompt(20), max_tokens=30, num_logprobs=3, temperature=1.0)
    steps = runner.finish(generated)[0]
    said: list[TokenLogprobs] = [entry for sampled in steps for entry in sampled.logprobs]

    again = sequence(generated.token_ids, max_tokens=1, num_prompt_logprobs=3)
    [found] = run(engine, [again])

    assert [entry.token for entry in found] == generated.token_ids[1:]
    assert [entry.top_token_ids for entry in found[19:]] == [entry.top_token_ids for entry in said]
    wanted = [[entry.logprob, *entry.top_logprobs] for entry in said]
    np.testing.assert_allclose([entry.logprobs for entry in found[19:]], wanted, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunks_and_batch_do_not_matter(engine: Engine, chunk: int) -> None:
    alone = [run(engine, [scored(length)])[0] for length in LENGTHS]
    together = run(engine, [scored(length) for length in LENGTHS], chunk)
    assert [len(found) for found in together] == [length - 1 for length in LENGTHS]
    for one, other in zip(together, alone, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("sections", ["native"], indirect=True)
def test_native_kernels_give_the_same_bits(engine: Engine) -> None:
    alone = [run(engine, [scored(length)])[0] for length in LENGTHS]
    for chunk in (1, 7, 16, 1000):
        assert run(engine, [scored(length) for length in LENGTHS], chunk) == alone


@pytest.mark.parametrize("sections", ["native"], indirect=True)
def test_pieces_change_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    [whole] = run(engine, [scored(90)])
    monkeypatch.setattr(prompt_logprobs, "MAX_LOGITS", 5 * VOCAB_SIZE + 1)
    rows: list[int] = []
    logprobs_of = prompt_logprobs.logprobs_of

    def spy(logits: Any, piece: prompt_logprobs.PromptRows) -> PromptLogprobs:
        rows.append(len(logits))
        return logprobs_of(logits, piece)

    monkeypatch.setattr("kvrelay.engine.native_kernels.logprobs_of", spy)
    assert run(engine, [scored(90)]) == [whole]
    assert rows == [5] * 17 + [4]


def test_ranks_and_alternatives(engine: Engine) -> None:
    most = VOCAB_SIZE + 5 if isinstance(engine, PaddleEngine) else MOST_LOGPROBS
    [found], [all_of_them] = run(engine, [scored(40, 0)]), run(engine, [scored(40, most)])
    assert all(not entry.top_token_ids and len(entry.logprobs) == 1 for entry in found)
    for entry, wide in zip(found, all_of_them, strict=True):
        if wide.rank <= most:
            assert wide.top_token_ids[wide.rank - 1] == wide.token, "the prompt has no ties here"
            assert wide.logprobs[wide.rank] == wide.logprobs[0]
        assert wide.logprobs[1:] == sorted(wide.logprobs[1:], reverse=True)
        if most > VOCAB_SIZE:
            assert sorted(wide.top_token_ids) == list(range(VOCAB_SIZE))
            np.testing.assert_allclose(np.exp(wide.logprobs[1:]).sum(), 1.0, rtol=1e-6)
        assert entry.rank == wide.rank


def test_sampling_parameters_do_not_matter(engine: Engine) -> None:
    changed = scored(40, temperature=1.7, top_k=3, repetition_penalty=1.8, logit_bias={5: 50.0})
    [found], [plain] = run(engine, [changed]), run(engine, [scored(40)])
    assert_close(found, plain)


def test_sequences_that_want_none_get_none(engine: Engine) -> None:
    runner = Runner(engine)
    wanted, plain = scored(17), sequence(prompt(17), "plain", max_tokens=3)
    first, second = runner.run((wanted, 10), (plain, 17))
    assert first.prompt_logprobs and not second.prompt_logprobs
    first, second = runner.run((wanted, 7), (plain, 1))
    assert first.token_ids and first.prompt_logprobs and not second.prompt_logprobs
    first, second = runner.run((wanted, 1), (plain, 1))
    assert not first.prompt_logprobs and not second.prompt_logprobs


def test_logits_that_are_not_finite_fail_the_sequence_alone(tmp_path: Path, sections: dict[str, Any]) -> None:
    write_tiny_checkpoint(tmp_path, "llama")
    set_weights(tmp_path, "lm_head.weight", 7, np.inf)
    engine = open_engine(tmp_path, **sections)
    try:
        wanted, plain = scored(17), sequence(prompt(17), "plain")
        for one in (wanted, plain):
            Runner(engine).give_blocks(one, 17)
        plan = plan_of(engine, (wanted, Chunk(0, 10, False)), (plain, Chunk(0, 10, False)))
        failed, other = outcomes_in_order(engine.run(plan, lambda layers: None))
        assert isinstance(failed, SequenceFailed) and "not finite at prompt position 1" in failed.reason
        assert other == SampledTokens([], [])
    finally:
        engine.close()
