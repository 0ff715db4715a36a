"""The device engine against what Hugging Face transformers computed for the same weights, on a CPU in float32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import Runner, open_engine, output, sequence
from golden.cases import CASES, GoldenCase, load_golden

from kvrelay.engine.device.decoder import DeviceDecoder

LONGEST_PROMPT = 200
"""Longer ones are left to machines with a device."""


@pytest.fixture
def logits_seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Collect the first row of logits of each step."""
    seen: list[np.ndarray] = []
    real = DeviceDecoder.sample

    def spy(self: DeviceDecoder, logits: Any, step: Any) -> Any:
        seen.append(logits[:1].numpy().copy())
        return real(self, logits, step)

    monkeypatch.setattr(DeviceDecoder, "sample", spy)
    return seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["torch", "paddle-device"])
def test_tokens_and_logits_are_those_of_transformers(
    kind: str, case: GoldenCase, tmp_path: Path, logits_seen: list[np.ndarray]
) -> None:
    case.write_checkpoint(tmp_path)
    model = {"max_model_len": case.max_model_len, "dtype": "float32"}
    scheduler = {"max_num_seqs": 2}
    engine = open_engine(tmp_path, model=model, scheduler=scheduler, engine={"kind": kind})
    for golden in load_golden(case):
        if len(golden.prompt_token_ids) > LONGEST_PROMPT:
            continue
        logits_seen.clear()
        one = sequence(golden.prompt_token_ids, max_tokens=case.num_output_tokens)
        Runner(engine).finish(one)
        assert output(one) == golden.output_token_ids
        ours = np.concatenate([logits_seen[index] for index in golden.logits_at])
        np.testing.assert_allclose(ours, golden.logits, rtol=0, atol=1e-4 * np.abs(golden.logits).max())
    engine.close()


@pytest.mark.parametrize(("name", "other"), [("torch", "paddle"), ("paddle", "torch")])
def test_a_device_engine_imports_one_framework(name: str, other: str) -> None:
    import subprocess

    code = (
        "import sys, kvrelay.engine.device.load as load;"
        f"load.make_framework({name!r}, 'cpu');"
        f"print({name!r} in sys.modules, {other!r} in sys.modules, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]
