"""Products of a single row, with what is computed in the same kernel, against one operator after the other.

In float16: the conversions of bfloat16 are checked on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import Shape, close, operations

from kvrelay.engine.device.kernels import single_row
from kvrelay.engine.device.projections import FrameworkProjections
from kvrelay.engine.device.single_row import SingleRowProjections
from kvrelay.engine.device.torch_framework import TorchFramework
from kvrelay.engine.device.weights import Linear

EPS = 1e-5


def projections() -> tuple[SingleRowProjections, FrameworkProjections]:
    framework = TorchFramework("cpu")
    ours, theirs = operations(Shape(dtype="float16"))
    return SingleRowProjections(framework, ours, EPS, "float16"), FrameworkProjections(framework, theirs, EPS)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def linear(rows: int, columns: int, seed: int, biased: bool) -> Linear:
    return Linear(random(rows, columns, seed=seed) * 0.05, random(rows, seed=seed + 1) if biased else None)


def outputs(project: FrameworkProjections, rows: int, hidden: int, ffn: int, biased: bool) -> list[Any]:
    """Return what the products of a layer give, one after the other."""
    residual, norm = random(rows, hidden, seed=1), random(hidden, seed=2)
    qkv = project.normed(residual, None, norm, linear(392, hidden, 3, biased))
    assert project.add(residual, random(rows, hidden, seed=5), linear(hidden, hidden, 6, biased)) is None
    added = residual.clone()
    gate_up, down = linear(2 * ffn, hidden, 8, biased), linear(hidden, ffn, 10, biased)
    assert project.feed_forward(residual, None, norm, gate_up, down) is None
    return [qkv, added, residual]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the shapes of the outputs that our kernel computes."""
    shapes = []
    original = single_row.multiply

    def multiply(*arguments: Any, **options: Any) -> None:
        shapes.append(tuple(arguments[5].shape))
        original(*arguments, **options)

    monkeypatch.setattr(single_row, "multiply", multiply)
    return shapes


@pytest.mark.parametrize(("hidden", "ffn"), [(512, 256), (896, 640)])
@pytest.mark.parametrize("biased", [False, True])
def test_layers_equal_one_operator_after_the_other(
    launched: list[tuple[int, ...]], hidden: int, ffn: int, biased: bool
) -> None:
    ours, theirs = (outputs(project, 1, hidden, ffn, biased) for project in projections())
    for mine, reference in zip(ours, theirs, strict=True):
        assert close(mine, reference, 2e-3)
    assert launched == [(1, 392), (1, hidden), (1, ffn), (1, hidden)]


@pytest.mark.parametrize(("rows", "hidden"), [(2, 512), (1, 96)])
def test_several_rows_and_other_sizes_are_left_to_the_framework(
    launched: list[tuple[int, ...]], rows: int, hidden: int
) -> None:
    ours, theirs = (outputs(project, rows, hidden, 96, True) for project in projections())
    for mine, reference in zip(ours, theirs, strict=True):
        assert close(mine, reference, 2e-3)
    assert launched == []


def test_a_row_that_is_not_finite_stays_so() -> None:
    ours, _ = projections()
    x = random(1, 512, seed=1)
    x[0, 77] = float("nan")
    out = ours.normed(x, None, random(512, seed=2), linear(392, 512, 3, True))
    assert out.isnan().all()
