"""Our engine against what Hugging Face transformers computed for the same weights (see scripts/make_golden)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import Runner, open_engine, output, sequence
from golden.cases import CASES, PROMPT_LENGTHS, GoldenCase, load_golden

from kvrelay.engine import paddle_engine
from kvrelay.engine.sampler import sample_step


@pytest.fixture
def logits_seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Collect what reaches the sampler."""
    seen: list[np.ndarray] = []
    real = sample_step

    def spy(logits: np.ndarray, batch: Any) -> Any:
        if logits.size:
            seen.append(logits.copy())
        return real(logits, batch)

    monkeypatch.setattr(paddle_engine, "sample_step", spy)
    return seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_and_logits_are_those_of_transformers(
    case: GoldenCase, tmp_path: Path, logits_seen: list[np.ndarray], kernels: str
) -> None:
    case.write_checkpoint(tmp_path)
    model = {"max_model_len": case.max_model_len, "dtype": "float32"}
    engine = open_engine(tmp_path, model=model, engine={"kernels": kernels})
    prompts = list(load_golden(case))
    assert len(prompts) == len(case.prompt_lengths)
    for golden in prompts:
        logits_seen.clear()
        one = sequence(golden.prompt_token_ids, max_tokens=case.num_output_tokens)
        runner = Runner(engine)
        runner.finish(one)
        assert output(one) == golden.output_token_ids
        ours = np.concatenate([logits_seen[index] for index in golden.logits_at])
        scale = np.abs(golden.logits).max()
        np.testing.assert_allclose(ours, golden.logits, rtol=0, atol=1e-4 * scale)
    engine.close()


def test_golden_data_covers_every_prompt_length_for_every_architecture() -> None:
    covered = {(case.arch, length) for case in CASES for length in case.prompt_lengths}
    archs = ("llama", "mistral", "qwen2", "qwen3", "ernie4_5")
    assert {(arch, length) for arch in archs for length in PROMPT_LENGTHS} <= covered
