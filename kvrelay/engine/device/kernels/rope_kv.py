"""Head norms, RoPE and the writing of keys and values to the pool, in one pass over the projections."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rope_kv_kernel(
    qkv, q_norm, k_norm, cosine, sine, positions, slots, queries, keys, values, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """``BH`` heads of one token. A slot below 0 is not written."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    half: tl.constexpr = D // 2
    column = tl.arange(0, HALF)
    inside = column < half
    there = (head < H + 2 * G)[:, None] & inside[None, :]
    source = qkv + (row * (H + 2 * G) + head[:, None]) * D + column[None, :]
    low = tl.load(source, mask=there, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=there, other=0.0).to(tl.float32)
    is_query = (head < H)[:, None]
    is_value = (head >= H + G)[:, None]
    if NORM:
        scale = 1.0 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)
        q_low = tl.load(q_norm + column, mask=inside, other=0.0).to(tl.float32)
        q_high = tl.load(q_norm + half + column, mask=inside, other=0.0).to(tl.float32)
        k_low = tl.load(k_norm + column, mask=inside, other=0.0).to(tl.float32)
        k_high = tl.load(k_norm + half + column, mask=inside, other=0.0).to(tl.float32)
        low = tl.where(is_value, low, low * scale[:, None] * tl.where(is_query, q_low[None, :], k_low[None, :]))
        high = tl.where(is_value, high, high * scale[:, None] * tl.where(is_query, q_high[None, :], k_high[None, :]))
    position = tl.load(positions + row).to(tl.int64)
    cos = tl.load(cosine + position * half + column, mask=inside, other=0.0)[None, :]
    sin = tl.load(sine + position * half + column, mask=inside, other=0.0)[None, :]
    out_low = tl.where(is_value, low, low * cos - high * sin)
    out_high = tl.where(is_value, high, high * cos + low * sin)
    q_out = queries + (row * H + head[:, None]) * D + column[None, :]
    tl.store(q_out, out_low.to(queries.dtype.element_ty), mask=there & is_query)
    tl.store(q_out + half, out_high.to(queries.dtype.element_ty), mask=there & is_query)
    slot = tl.load(slots + row).to(tl.int64)
    written = there & (slot >= 0)
    k_out = keys + (slot * G + head[:, None] - H) * D + column[None, :]
    is_key = (head >= H)[:, None] & (head < H + G)[:, None]
    tl.store(k_out, out_low.to(keys.dtype.element_ty), mask=written & is_key)
    tl.store(k_out + half, out_high.to(keys.dtype.element_ty), mask=written & is_key)
    v_out = values + (slot * G + head[:, None] - H - G) * D + column[None, :]
    tl.store(v_out, out_low.to(values.dtype.element_ty), mask=written & is_value)
    tl.store(v_out + half, out_high.to(values.dtype.element_ty), mask=written & is_value)


def apply_rope_and_write_kv(
    qkv: Any, norms: Any | None, eps: float, cosine: Any, sine: Any, positions: Any, slots: Any,
    queries: Any, keys: Any, values: Any,
) -> None:  # fmt: skip
    """Write turned queries [N, H, D], and turned keys and values to their slots of ``keys``, ``values`` [slots, G, D].

    ``qkv`` [N, (H + 2 * G) * D]; ``cosine`` and ``sine`` float32 [positions, D / 2].
    """
    rows, heads, dim = queries.shape
    groups = keys.shape[1]
    q_norm, k_norm = (qkv, qkv) if norms is None else norms
    block = 8
    rope_kv_kernel[(rows, triton.cdiv(heads + 2 * groups, block))](
        qkv, q_norm, k_norm, cosine, sine, positions, slots, queries, keys, values, eps,
        heads, groups, dim, triton.next_power_of_2(dim // 2), norms is not None, block, num_warps=4,
    )  # fmt: skip
