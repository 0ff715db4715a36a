from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_runs import KERNELS, open_engine, use_kernels

from kvrelay.engine import select_kernels
from kvrelay.engine.interface import Engine
from kvrelay.engine.native.library import NativeLibrary
from kvrelay.engine.tiny import write_tiny_checkpoint

LEVELS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with two attention windows and biases: every path of the forward pass but one."""
    path = tmp_path_factory.mktemp("tiny")
    windows = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 2}
    write_tiny_checkpoint(path, "qwen2", overrides=windows)
    return path


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``engine.kernels`` must be for each kind of kernels."""
    return use_kernels(request.param, monkeypatch)


@pytest.fixture
def engine(tiny_dir: Path, kernels: str) -> Iterator[Engine]:
    loaded = open_engine(tiny_dir, engine={"kernels": kernels})
    yield loaded
    loaded.close()


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeLibrary]:
    """Our own library, at each level of instructions that this CPU has."""
    use_kernels("native", monkeypatch)
    opened = select_kernels.open_library()
    opened.limit_isa(request.param)
    if opened.isa != LEVELS[request.param]:
        opened.limit_isa(len(LEVELS) - 1)
        pytest.skip("not on this CPU")
    yield opened
    opened.limit_isa(len(LEVELS) - 1)
