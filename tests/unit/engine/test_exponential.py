"""The exponential of our own library, where it is used: SiLU and the softmax of attention, against float64."""

from __future__ import annotations

import ctypes

import numpy as np

from kvrelay.engine.native.library import AttentionCall, NativeLibrary

DIM, NUM_KEYS, BLOCK_SIZE = 32, 300, 16


def silu(library: NativeLibrary, gate: np.ndarray) -> np.ndarray:
    """Return SiLU of ``gate`` times one."""
    rows = np.concatenate([gate, np.ones_like(gate)])[None].astype(np.float32)
    out = np.empty((1, len(gate)), np.float32)
    library.silu_mul(rows.ctypes.data, out.ctypes.data, 1, len(gate), 0)
    return out.reshape(-1)


def attended(library: NativeLibrary, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return what a query of ones, at the last position, gets of ``keys`` and ``values`` [NUM_KEYS, DIM]."""
    num_blocks = -(-NUM_KEYS // BLOCK_SIZE)
    table = np.random.default_rng(1).permutation(num_blocks).astype(np.int32)
    slots = (table[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1)[:NUM_KEYS]
    planes = np.zeros((2, num_blocks * BLOCK_SIZE, DIM), np.float32)
    planes[:, slots] = keys, values
    query, out = np.ones((1, DIM), np.float32), np.empty((1, DIM), np.float32)
    sequences = np.array([[0, 1, NUM_KEYS - 1, table.ctypes.data]], np.int64)
    call = AttentionCall(
        queries=query.ctypes.data,
        keys=planes[0].ctypes.data,
        values=planes[1].ctypes.data,
        out=out.ctypes.data,
        sequences=sequences.ctypes.data,
        num_sequences=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=DIM,
        block_size=BLOCK_SIZE,
        scale=1.0,
    )
    library.attention(ctypes.byref(call))
    return out.reshape(-1)


def test_silu_is_exact_over_its_whole_range(library: NativeLibrary) -> None:
    gate = np.concatenate([np.linspace(-85, 85, 20_001), np.random.default_rng(2).standard_normal(5_000)])
    gate = gate.astype(np.float32)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))
    # the exponent is rounded before it is used: by up to 6e-8 of 85, and so the power by 5e-6 of it
    np.testing.assert_allclose(silu(library, gate), exact, rtol=1e-5)


def test_silu_at_the_ends(library: NativeLibrary) -> None:
    far = silu(library, np.array([-1e4, -200.0, 0.0, 200.0, 1e4, np.nan], np.float32))
    np.testing.assert_allclose(far[:5], [0, 0, 0, 200, 1e4], atol=1e-30)
    assert np.isnan(far[5])


def test_softmax_is_exact_where_scores_are_near_and_far(library: NativeLibrary) -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((NUM_KEYS, DIM), np.float32)
    for spread in (0.01, 1.0, 40.0, 1000.0):
        scores = spread * rng.standard_normal(NUM_KEYS).astype(np.float32)
        keys = np.zeros((NUM_KEYS, DIM), np.float32)
        keys[:, 0] = scores
        weights = np.exp(scores.astype(np.float64) - scores.max())
        exact = weights @ values.astype(np.float64) / weights.sum()
        np.testing.assert_allclose(attended(library, keys, values), exact, rtol=1e-4, atol=1e-5)


def test_a_score_that_is_no_number_stays_visible(library: NativeLibrary) -> None:
    keys = np.zeros((NUM_KEYS, DIM), np.float32)
    keys[200, 0] = np.nan
    assert np.isnan(attended(library, keys, np.ones((NUM_KEYS, DIM), np.float32))).all()
