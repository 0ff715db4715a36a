"""Kernels that quantize, against torch's operators."""

from __future__ import annotations

import pytest
import torch
from steps import Case, Shape, operations

from kvrelay.engine.device.operations import Quantized

SHAPES = [Shape(), Shape(dtype="float16")]
WIDTHS = [16, 24, 130]


def assert_equal(ours: Quantized, theirs: Quantized) -> None:
    """Scales may differ by float32's rounding, and a value by one step if it lies between two."""
    assert torch.allclose(ours.scales, theirs.scales, rtol=1e-6, atol=0)
    mine, reference = ours.values.float(), theirs.values.float()
    assert ((mine - reference).abs() <= reference.abs() / 8).all()
    assert float((mine == reference).float().mean()) > 0.98


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows that are not finite
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows(shape: Shape, width: int) -> None:
    ours, theirs = operations(shape)
    x = Case(shape, [(0, 1)], 16).random(9, width)
    x[2], x[3, 5], x[4, 0], x[5, 1] = 0.0, float("nan"), 3e4, float("inf")
    values, scales = ours.quantized(x)
    finite = [row for row in range(9) if row not in (3, 5)]
    reference = theirs.quantized(x)
    assert_equal(
        Quantized(values[finite], scales[finite]), Quantized(reference.values[finite], reference.scales[finite])
    )
    assert torch.equal(values.float()[[0, 1, 4]].abs().amax(1), torch.full((3,), 448.0))
    assert not values.float()[2].any()
    for one in (values, reference.values):
        assert one.float().sum(1).isfinite().nonzero()[:, 0].tolist() == finite, "a product says so"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_within_a_sixteenth_of_what_it_was(shape: Shape) -> None:
    ours, _ = operations(shape)
    x = Case(shape, [(0, 1)], 16).random(40, 128)
    values, scales = ours.quantized(x)
    wide = x.float()
    smallest_normal = scales * 2.0**-6
    assert ((values.float() * scales - wide).abs() <= torch.maximum(wide.abs() / 16, smallest_normal / 8)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("adds", [False, True])
def test_norms(shape: Shape, width: int, adds: bool) -> None:
    ours, theirs = operations(shape)
    case = Case(shape, [(0, 1)], 16)
    residuals = [case.random(9, width, seed=1) for _ in range(2)]
    due = case.random(9, width, seed=2) if adds else None
    weight = case.random(width, seed=3)
    results = [do.quantized_norm(one, due, weight, 1e-6) for do, one in zip((ours, theirs), residuals, strict=True)]
    assert_equal(*results)
    assert torch.equal(*residuals)
    assert torch.equal(residuals[0], case.random(9, width, seed=1)) is not adds


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(shape: Shape, width: int) -> None:
    ours, theirs = operations(shape)
    x = Case(shape, [(0, 1)], 16).random(5, 2 * width)
    assert_equal(ours.quantized_silu_mul(x), theirs.quantized_silu_mul(x))
