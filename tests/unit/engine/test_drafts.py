"""Steps that verify drafts, and steps over KV that is there already, give the tokens of plain steps on any engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import KERNELS, Runner, open_engine, output, planes_of, run_batch, sequence, take, use_kernels
from support.token_rules import strict_rules

from kvrelay.config.cluster_config import FakeEngineConfig
from kvrelay.engine import kv_pool, portable
from kvrelay.engine.fake import FakeEngine
from kvrelay.engine.interface import Engine
from kvrelay.node.plans import Chunk
from kvrelay.protocol.messages.engine import SampledTokens
from kvrelay.protocol.request import Grammar, GrammarKind, Sequence

LENGTH, OUTPUTS = 33, 12
RULES = {"temperature": 0.9, "seed": 4, "token_rules": strict_rules(384)}
GRAMMAR = {"grammar": Grammar(GrammarKind.REGEX, "([a-m][n-z]){50}")}


@pytest.fixture(params=[*KERNELS, "staged", "fake"])
def any_engine(request: pytest.FixtureRequest, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    if request.param == "staged":
        monkeypatch.setattr(portable, "MappedPool", kv_pool.StagedPool)
    kernels = use_kernels(request.param, monkeypatch) if request.param in KERNELS else "portable"
    fake = FakeEngine(FakeEngineConfig(vocab_size=384), 16, 256) if request.param == "fake" else None
    loaded = fake or open_engine(tiny_dir, engine={"kernels": kernels})
    yield loaded
    loaded.close()


def asked(**sampling: Any) -> Sequence:
    prompt = np.random.default_rng(5).integers(0, 384, LENGTH).tolist()
    return sequence(prompt, **{"max_tokens": OUTPUTS, "num_logprobs": 1, **sampling})


def plain(engine: Engine, **sampling: Any) -> tuple[list[int], list[float]]:
    """Return tokens and logprobs of plain steps."""
    one = asked(**sampling)
    (steps,) = Runner(engine).finish(one)
    return output(one), [entry.logprob for step in steps for entry in step.logprobs]


def verified(runner: Runner, one: Sequence, drafts: tuple[int, ...]) -> SampledTokens:
    """Run one step with ``drafts`` and append what comes out."""
    start, count = one.num_tokens - 1, 1 + len(drafts)
    runner.give_blocks(one, start + count)
    chunk = Chunk(start, count, True, drafts)
    [sampled] = run_batch(runner.engine, (one, chunk)).sampled
    take(runner.engine, one, chunk, sampled)
    return sampled


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 4}, {"repetition_penalty": 1.3}, GRAMMAR, RULES])
@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_drafts_are_accepted_as_far_as_they_are_right(
    any_engine: Engine, sampling: dict[str, Any], num_right: int
) -> None:
    wanted, logprobs = plain(any_engine, **sampling)
    runner, one, found = Runner(any_engine, seed=2), asked(**sampling), []
    found += runner.run((one, LENGTH))[0].logprobs
    while (done := one.num_output_tokens) < OUTPUTS - 4:
        drafts = [
            *wanted[done : done + num_right],
            *((token + 1) % 384 for token in wanted[done + num_right : done + 3]),
        ]
        sampled = verified(runner, one, tuple(drafts))
        assert len(sampled.token_ids) == num_right + 1
        found += sampled.logprobs
    assert output(one) == wanted[: one.num_output_tokens]
    np.testing.assert_allclose([entry.logprob for entry in found], logprobs[: len(found)], atol=1e-4)


def test_a_step_with_no_drafts_at_all_is_a_plain_one(any_engine: Engine) -> None:
    wanted, _ = plain(any_engine)
    runner, one = Runner(any_engine), asked()
    runner.run((one, LENGTH))
    assert verified(runner, one, ()).token_ids == wanted[1:2]


def test_sequences_with_and_without_drafts_share_a_step(any_engine: Engine) -> None:
    wanted, _ = plain(any_engine)
    runner = Runner(any_engine)
    one, other, late = asked(), asked(), asked()
    for item in (one, other):
        runner.run((item, LENGTH))
        runner.give_blocks(item, LENGTH + 3)
    runner.give_blocks(late, 20)
    batch = [
        (late, Chunk(0, 20, False)),
        (one, Chunk(LENGTH, 3, True, (wanted[1], wanted[2]))),
        (other, Chunk(LENGTH, 1, True)),
    ]
    sampled = run_batch(any_engine, *batch).sampled
    assert [item.token_ids for item in sampled] == [[], wanted[1:4], wanted[1:2]]


def test_a_prompt_that_is_wholly_there_computes_its_last_token_and_writes_nothing(any_engine: Engine) -> None:
    wanted, _ = plain(any_engine)
    source, one = Runner(any_engine), asked()
    source.run((one, LENGTH))
    planes = planes_of(any_engine)
    again = asked()
    again.take_blocks(source.free[:3])
    planes[:, :, again.block_table] = planes[:, :, one.block_table]
    again.num_computed_tokens = LENGTH
    before = planes.copy()
    assert run_batch(any_engine, (again, Chunk(LENGTH - 1, 1, True))).sampled[0].token_ids == wanted[:1]
    np.testing.assert_array_equal(planes, before)
