"""Whoever looks into the KV store from outside must look for the very KV that nodes put there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_runs import node_config, open_engine, use_kernels

from kvrelay.engine.geometry import node_geometry
from kvrelay.engine.tiny import write_tiny_checkpoint

DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}}


@pytest.mark.parametrize(
    "sections",
    [
        {"engine": {"kernels": "portable"}},
        {"engine": {"kernels": "native"}},
        {"engine": {"kernels": "native"}, "model": {"dtype": "float32"}},
        {"engine": {"kernels": "auto"}},
        {"cache": {"block_size": 8}},
        {"model": {"max_model_len": 40}},
    ],
    ids=str,
)
@pytest.mark.parametrize("overrides", [{}, DYNAMIC], ids=["plain", "dynamic rope"])
def test_it_is_that_of_the_engine(
    tmp_path: Path, sections: dict[str, Any], overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if sections.get("engine") == {"kernels": "native"}:
        use_kernels("native", monkeypatch)
    write_tiny_checkpoint(tmp_path, "llama", overrides=overrides)
    engine = open_engine(tmp_path, **sections)
    try:
        told: list[int] = []
        assert node_geometry(node_config(tmp_path, **sections), lambda done, total: told.append(total - done)) == (
            engine.geometry
        )
        assert told[-1] == 0
    finally:
        engine.close()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", ["native", "gemm"])
def test_it_is_that_of_the_engine_for_a_bfloat16_checkpoint(
    tmp_path: Path, dtype: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvrelay.engine.select_kernels import open_onednn

    sections = {"engine": {"kernels": use_kernels(name, monkeypatch)}, "model": {"dtype": dtype}}
    if not open_onednn().supports_dtype("bfloat16"):
        pytest.skip("this CPU has no fast bfloat16")
    write_tiny_checkpoint(tmp_path, "llama", dtype="bfloat16")
    engine = open_engine(tmp_path, **sections)
    assert engine.geometry.dtype == {"native": "bfloat16", "gemm": "float32"}[name]
    assert node_geometry(node_config(tmp_path, **sections), lambda done, total: None) == engine.geometry
    engine.close()
