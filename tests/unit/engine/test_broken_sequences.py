"""What one sequence is the cause of ends that sequence: the others of its steps are the same to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import (
    KERNELS,
    Runner,
    open_engine,
    outcomes_in_order,
    output,
    plan_of,
    planes_of,
    run_batch,
    sequence,
    take,
    use_kernels,
)
from support.broken_checkpoint import break_embedding, set_weights
from support.ids import block_ids

from kvrelay.engine import isolation
from kvrelay.engine.compute_thread import ComputeThread
from kvrelay.engine.interface import Engine
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.errors import EngineError
from kvrelay.machine.contract import LayersComputed, StepDone
from kvrelay.node.plans import Chunk
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome
from kvrelay.protocol.request import Sequence

VOCAB_SIZE = 384
BAD, GOOD = 77, 78
"""A token whose embedding is infinite, and one to compare with."""

LENGTHS = (1, 5, 17, 40)


@pytest.fixture(scope="session")
def broken_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which one embedding is infinite, and the logits are not made of the embeddings."""
    path = tmp_path_factory.mktemp("broken")
    write_tiny_checkpoint(path, "llama")
    break_embedding(path, BAD)
    return path


@pytest.fixture(params=[*KERNELS, "torch"])
def sections(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a config says for each kind of kernels, and for the torch engine."""
    if request.param != "torch":
        return {"engine": {"kernels": use_kernels(request.param, monkeypatch)}}
    pytest.importorskip("torch", reason="kvrelay[torch] is not installed")
    return {"engine": {"kind": "torch"}, "model": {"dtype": "float32"}}


@pytest.fixture
def broken(broken_dir: Path, sections: dict[str, Any]) -> Iterator[Engine]:
    loaded = open_engine(broken_dir, **sections)
    yield loaded
    loaded.close()


def prompt(length: int) -> list[int]:
    return [token for token in np.random.default_rng(length).integers(0, VOCAB_SIZE, 2 * length + 8) if token != BAD][
        :length
    ]


def neighbours() -> list[Sequence]:
    """Greedy and sampled sequences that have nothing to do with any bad token."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 4},
        {"repetition_penalty": 1.3},
        {"num_logprobs": 3},
    ]
    return [
        sequence(list(map(int, prompt(length))), f"n{length}", **kind)
        for length, kind in zip(LENGTHS, kinds, strict=True)
    ]


def outcomes_of(engine: Engine, runner: Runner, batch: list[tuple[Sequence, int]]) -> list[SequenceOutcome]:
    """Run a step; sequences that did not fail go on."""
    scheduled = []
    for one, count in batch:
        runner.give_blocks(one, one.num_computed_tokens + count)
        samples = one.num_computed_tokens + count == one.num_tokens
        scheduled.append((one, Chunk(one.num_computed_tokens, count, samples)))
    outcomes = outcomes_in_order(run_batch(engine, *scheduled))
    for (one, chunk), outcome in zip(scheduled, outcomes, strict=True):
        if isinstance(outcome, SampledTokens):
            take(engine, one, chunk, outcome)
    return outcomes


def steps_with(engine: Engine, middle: int, num_steps: int = 6) -> list[list[SequenceOutcome]]:
    """Run the neighbours' prompts and decodes; in the first step with a prompt that has ``middle`` in it."""
    runner, others = Runner(engine, seed=3), neighbours()
    planes_of(engine).view(np.float32)[:] = np.nan  # whatever was there before must not matter
    first = sequence([5, 6, middle, 9, 8], "bad")
    batch = [*((one, one.num_tokens) for one in others[:2]), (first, 5), *((one, one.num_tokens) for one in others[2:])]
    steps = [outcomes_of(engine, runner, batch)]
    for _ in range(num_steps):
        steps.append(outcomes_of(engine, runner, [(one, 1) for one in others]))
    return steps


def test_an_infinite_embedding_fails_its_sequence_and_leaves_the_others_as_they_are(broken: Engine) -> None:
    good, bad = steps_with(broken, GOOD), steps_with(broken, BAD)
    assert bad[0][2] == SequenceFailed("the model's logits are not finite at output position 0")
    del good[0][2], bad[0][2]
    assert bad == good


def test_a_chunk_that_samples_nothing_fails_as_soon_as_it_is_not_finite(broken: Engine) -> None:
    """Its KV would be published after the step. No token of the chunk can be told to be good."""
    runner = Runner(broken)
    one, other = sequence([*range(20), BAD, *range(20, 40)], "bad"), neighbours()[2]
    assert outcomes_of(broken, runner, [(one, 16), (other, 17)])[0] == SampledTokens([], [])
    failed, fine = outcomes_of(broken, runner, [(one, 16), (other, 1)])
    assert isinstance(failed, SequenceFailed) and "hidden states are not finite at position" in failed.reason
    assert isinstance(fine, SampledTokens)
    del runner, one, other


def test_the_newest_token_is_the_bad_one(broken: Engine) -> None:
    """As when a model samples a token whose embedding is broken: what came before it was right."""
    runner, others = Runner(broken), neighbours()
    one = sequence([1, 2, 3], "bad", logit_bias={BAD: 100.0}, min_tokens=2)
    outcomes_of(broken, runner, [(one, 3), *((other, other.num_tokens) for other in others)])
    assert output(one) == [BAD]
    outcomes = outcomes_of(broken, runner, [(other, 1) for other in (others[0], one, *others[1:])])
    assert outcomes[1] == SequenceFailed("the model's logits are not finite at output position 1")
    assert sum(isinstance(outcome, SequenceFailed) for outcome in outcomes) == 1


@pytest.mark.parametrize("drafts", [(), (BAD,), (GOOD, BAD), (BAD, BAD), (GOOD, VOCAB_SIZE), (-1,)])
def test_a_guess_that_cannot_be_computed_is_as_good_as_a_wrong_one(broken: Engine, drafts: tuple[int, ...]) -> None:
    def outcome(drafts: tuple[int, ...] | None) -> SequenceOutcome:
        runner, one = Runner(broken), sequence([1, 2, 3, 4])
        runner.run((one, 4))
        runner.give_blocks(one, one.num_tokens + 2)
        chunk = Chunk(4, 1 + len(drafts or ()), True, drafts)
        return outcomes_in_order(run_batch(broken, (one, chunk)))[0]

    assert outcome(drafts) == outcome(None)


def test_a_guess_that_is_sampled_and_then_fails_fails_in_the_next_step(broken: Engine) -> None:
    runner, one = Runner(broken), sequence([1, 2, 3, 4], logit_bias={BAD: 100.0})
    runner.run((one, 3))
    runner.give_blocks(one, 8)
    result = run_batch(broken, (one, Chunk(3, 3, True, (BAD, GOOD))))
    assert outcomes_in_order(result) == [SampledTokens([BAD], [])]


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1 << 40])
def test_a_token_outside_the_vocabulary_fails_its_sequence(broken: Engine, token: int) -> None:
    runner, other, alone = Runner(broken), neighbours()[1], neighbours()[1]
    outcomes = outcomes_of(broken, runner, [(sequence([3, token, 4], "bad"), 3), (other, other.num_tokens)])
    assert outcomes[0] == SequenceFailed(f"token id {token} is not in the vocabulary of {VOCAB_SIZE}")
    assert outcomes[1:] == outcomes_of(broken, Runner(broken), [(alone, alone.num_tokens)])


def test_a_table_that_leaves_the_pool_fails_its_sequence(broken: Engine) -> None:
    runner, one, other = Runner(broken), sequence([1, 2, 3], "bad"), neighbours()[1]
    one.take_blocks(block_ids(broken.memory.num_blocks))
    outcomes = outcomes_of(broken, runner, [(other, other.num_tokens), (one, 3)])
    assert isinstance(outcomes[1], SequenceFailed) and "leaves the pool" in outcomes[1].reason
    assert isinstance(outcomes[0], SampledTokens)


@pytest.mark.parametrize(
    ("tensor", "value"), [("lm_head.weight", np.nan), ("model.layers.3.mlp.down_proj.weight", np.inf)]
)
def test_weights_that_are_not_finite_fail_whoever_they_are_for(
    tmp_path: Path, sections: dict[str, Any], tensor: str, value: float
) -> None:
    """All there are, each for itself. A row of the last layer shows in prompts and decodes alike."""
    write_tiny_checkpoint(tmp_path, "llama")
    set_weights(tmp_path, tensor, 3, value)
    engine = open_engine(tmp_path, **sections)
    runner, asked = Runner(engine), neighbours()
    outcomes = outcomes_of(engine, runner, [(one, one.num_tokens) for one in asked])
    engine.close()
    assert outcomes == [SequenceFailed("the model's logits are not finite at output position 0")] * len(asked)


def test_logits_of_minus_infinity_are_tokens_that_nobody_gets(tmp_path: Path, sections: dict[str, Any]) -> None:
    """What is infinite in a row of the head's weights is so in logits, of one sign or the other."""
    write_tiny_checkpoint(tmp_path, "llama")
    data = np.zeros(96, np.float32)
    data[0] = np.inf
    set_weights(tmp_path, "lm_head.weight", 9, data)  # type: ignore[arg-type]
    engine = open_engine(tmp_path, **sections)
    runner = Runner(engine)
    kinds = set()
    for seed in range(12):
        one = sequence(list(map(int, prompt(seed + 2))), "r", temperature=1.0, seed=seed)
        [outcome] = outcomes_of(engine, runner, [(one, one.num_tokens)])
        kinds.add(type(outcome))
        assert isinstance(outcome, SequenceFailed) or outcome.token_ids != [9]
    engine.close()
    assert SampledTokens in kinds


# ---------------------------------------------------------------- the whole step


@pytest.mark.parametrize("sections", KERNELS, indirect=True)
def test_what_breaks_the_forward_pass_is_found_and_the_others_grow_on(
    broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the midst of a layer: the step is run again in parts, and each layer is told once."""
    decoder = broken._decoder  # type: ignore[attr-defined]
    kernels = type(decoder._kernels)
    whole = kernels.silu_mul
    cursed = {"on": False}

    def silu_mul(self: object, gate_up: object) -> object:
        if cursed["on"]:
            raise RuntimeError("out of memory")
        return whole(self, gate_up)

    def begin_step(self: object, batch: object, windows: object, begin: object = kernels.begin_step) -> object:
        cursed["on"] = BAD in batch.token_ids  # type: ignore[attr-defined]
        return begin(self, batch, windows)  # type: ignore[operator]

    # Kept with what is logged, the traceback would keep views of the pool's memory.
    monkeypatch.setattr(isolation.logger, "disabled", True)
    monkeypatch.setattr(kernels, "silu_mul", silu_mul)
    monkeypatch.setattr(kernels, "begin_step", begin_step)

    def events(middle: int) -> list[object]:
        runner, others = Runner(broken), neighbours()
        posted: list[object] = []
        one = sequence([5, middle], "bad")
        thread = ComputeThread(broken, posted.append, layer_events=True)
        batch = []
        for item in (others[0], one, *others[1:]):
            runner.give_blocks(item, item.num_tokens)
            batch.append((item, Chunk(0, item.num_tokens, True)))
        thread.start()
        thread.submit(plan_of(broken, *batch))
        thread.stop()
        return posted

    bad, good = events(BAD), events(GOOD)
    assert [layer for event in bad if isinstance(event, LayersComputed) for layer in event.layers] == [0, 1, 2, 3]
    assert isinstance(bad[-1], StepDone) and isinstance(good[-1], StepDone)
    with_bad, with_good = outcomes_in_order(bad[-1].result), outcomes_in_order(good[-1].result)
    assert with_bad.pop(1) == SequenceFailed("RuntimeError: out of memory", retryable=True)
    del with_good[1]
    assert [tokens_of(outcome) for outcome in with_bad] == [tokens_of(outcome) for outcome in with_good]


def tokens_of(outcome: SequenceOutcome) -> list[int]:
    assert isinstance(outcome, SampledTokens)
    return outcome.token_ids


def test_whoever_runs_an_engine_by_hand_gets_an_exception(broken: Engine) -> None:
    with pytest.raises(EngineError, match="not finite"):
        Runner(broken).run((sequence([BAD]), 1))
