"""Sampling on the device: one program takes one row of logits from its penalties to its token and log probabilities.

The order of operations and the random numbers are those of ``kvrelay.engine.sampler``. Thresholds of top_k and top_p
are found by bisection on the bits of the weights, four ways at a time: the weights are not negative, so their bits are
ordered as they are, and the search ends at the exact value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
ONE_BITS = tl.constexpr(0x3F800000)
GREEDY_BELOW = tl.constexpr(1e-5)


@triton.jit
def _highest(values, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the highest of ``V`` values, where it first is, and how many are not finite."""
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        value = tl.load(values + start + columns, mask=start + columns < V, other=-float("inf"))
        finite = tl.abs(value) < float("inf")
        wrong += tl.where(finite | (start + columns >= V), 0, 1)
        higher = value > best
        best = tl.where(higher, value, best)
        at = tl.where(higher, start + columns, at)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, at, V), 0), tl.sum(wrong, 0)


@triton.jit
def _next_highest(values, below, after, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the highest value, and its place, that comes after ``below`` at place ``after`` in falling order."""
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    at = tl.full([BLOCK], V, tl.int32)
    for start in range(0, V, BLOCK):
        place = start + columns
        value = tl.load(values + place, mask=place < V, other=-float("inf"))
        later = (value < below) | ((value == below) & (place > after))
        higher = (place < V) & later & ((value > best) | (at == V))
        best = tl.where(higher, value, best)
        at = tl.where(higher, place, at)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, at, V), 0)


@triton.jit
def _sum_exp(values, top, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of exp(value - top)."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        value = tl.load(values + start + columns, mask=start + columns < V, other=-float("inf"))
        total += tl.exp2((value - top) * LOG2E)
    return tl.sum(total, 0)


@triton.jit
def _weigh(values, weights, top, inverse, V: tl.constexpr, BLOCK: tl.constexpr):
    """Write exp((value - top) * inverse) to ``weights``."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        value = tl.load(values + start + columns, mask=inside, other=0.0)
        tl.store(weights + start + columns, tl.exp2((value - top) * inverse * LOG2E), mask=inside)


@triton.jit
def _mass(weights, low, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of the weights whose bits are ``low`` or more, piece by piece in float64, and the last place."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([], tl.float64)
    last = tl.zeros([], tl.int32)
    for start in range(0, V, BLOCK):
        weight = tl.load(weights + start + columns, mask=start + columns < V, other=0.0)
        kept = (weight.to(tl.int32, bitcast=True) >= low) & (weight > 0)
        total += tl.sum(tl.where(kept, weight, 0.0), 0).to(tl.float64)
        last = tl.maximum(last, tl.max(tl.where(kept, start + columns, 0), 0))
    return total, last


@triton.jit
def _threshold(weights, low, goal, COUNT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the highest bits that at least ``goal`` of the weights, by number or by sum, have or exceed.

    ``low`` is the answer if no higher bits are.
    """
    columns = tl.arange(0, BLOCK)
    high = tl.full([], ONE_BITS + 1, tl.int32)
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        first = low + step
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        over_first = tl.zeros([BLOCK], tl.float32)
        over_second = tl.zeros([BLOCK], tl.float32)
        over_third = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            weight = tl.load(weights + start + columns, mask=start + columns < V, other=0.0)
            bits = weight.to(tl.int32, bitcast=True)
            if COUNT:
                weight = tl.where(start + columns < V, 1.0, 0.0)
            over_first += tl.where(bits >= first, weight, 0.0)
            over_second += tl.where(bits >= second, weight, 0.0)
            over_third += tl.where(bits >= third, weight, 0.0)
        has_first = tl.sum(over_first, 0) >= goal
        has_second = tl.sum(over_second, 0) >= goal
        has_third = tl.sum(over_third, 0) >= goal
        new_low = tl.where(has_first, tl.where(has_second, tl.where(has_third, third, second), first), low)
        high = tl.where(has_first, tl.where(has_second, tl.where(has_third, high, third), second), first)
        low = new_low
    return low


@triton.jit
def _draw(weights, low, uniform, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return where the distribution function of the weights from ``low`` on passes ``uniform``."""
    columns = tl.arange(0, BLOCK)
    total, last = _mass(weights, low, V, BLOCK)
    target = uniform * total
    passed = tl.zeros([], tl.float64)
    start = tl.zeros([], tl.int32)
    found = tl.zeros([], tl.int32)
    while (start < V) & (found == 0):
        weight = tl.load(weights + start + columns, mask=start + columns < V, other=0.0)
        kept = (weight.to(tl.int32, bitcast=True) >= low) & (weight > 0)
        piece = tl.sum(tl.where(kept, weight, 0.0), 0).to(tl.float64)
        found = (passed + piece > target).to(tl.int32)
        passed = tl.where(found == 1, passed, passed + piece)
        start = tl.where(found == 1, start, start + BLOCK)
    token = last
    if found == 1:
        weight = tl.load(weights + start + columns, mask=start + columns < V, other=0.0)
        kept = (weight.to(tl.int32, bitcast=True) >= low) & (weight > 0)
        cumulated = tl.cumsum(tl.where(kept, weight, 0.0), 0)
        beyond = kept & (passed + cumulated.to(tl.float64) > target)
        first = tl.min(tl.where(beyond, start + columns, V), 0)
        final = tl.max(tl.where(kept, start + columns, 0), 0)
        token = tl.where(first < V, first, final)
    return token


@triton.jit
def _adjust(values, adjusted, tokens, changes, capacity, begin, end, V: tl.constexpr, BLOCK: tl.constexpr):
    """Copy a row to ``adjusted`` and change entries ``begin`` to ``end``: add a bias, penalize, subtract."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        tl.store(adjusted + start + columns, tl.load(values + start + columns, mask=inside, other=0.0), mask=inside)
    tl.debug_barrier()
    for start in range(begin, end, BLOCK):
        entry = start + columns
        inside = entry < end
        place = tl.load(tokens + entry, mask=inside, other=0)
        value = tl.load(adjusted + place, mask=inside, other=0.0)
        value += tl.load(changes + entry, mask=inside, other=0.0)
        penalty = tl.load(changes + capacity + entry, mask=inside, other=1.0)
        value = tl.where(value > 0, tl.div_rn(value, penalty), value * penalty)
        value -= tl.load(changes + 2 * capacity + entry, mask=inside, other=0.0)
        tl.store(adjusted + place, value, mask=inside)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["capacity", "entries"])
def sample_kernel(
    logits, weights, reals, numbers, capacity, adjusted_tokens, changes, entries, last_tokens, tokens, top_tokens,
    logprobs, V: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. A token of -1 says that a logit is not finite."""
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * V
    mine = weights + row * V
    uniform = tl.load(reals + row)
    temperature = tl.load(reals + capacity + row)
    top_p = tl.load(reals + 2 * capacity + row)
    min_p = tl.load(reals + 3 * capacity + row)
    top_k = tl.load(numbers + row)
    num_logprobs = tl.load(numbers + capacity + row)
    table_row = tl.load(numbers + 2 * capacity + row)
    begin = tl.load(numbers + 3 * capacity + row)
    end = tl.load(numbers + 4 * capacity + row)
    raw_top, token, wrong = _highest(values, V, BLOCK)
    top = raw_top
    if end > begin:
        _adjust(values, mine, adjusted_tokens, changes, entries, begin, end, V, BLOCK)
        top, token, _unused = _highest(mine, V, BLOCK)
    if (temperature >= GREEDY_BELOW) & (wrong == 0):
        inverse = (1.0 / temperature).to(tl.float32)
        if end > begin:
            _weigh(mine, mine, top, inverse, V, BLOCK)
        else:
            _weigh(values, mine, top, inverse, V, BLOCK)
        tl.debug_barrier()
        low = min_p.to(tl.float32).to(tl.int32, bitcast=True)
        if (top_k > 0) & (top_k < V):
            low = _threshold(mine, low, top_k.to(tl.float32), True, V, BLOCK)
        if top_p < 1.0:
            total, _unused = _mass(mine, low, V, BLOCK)
            # all below this together are less than 1 - top_p of the total; half of it, for what rounding may do
            surely = ((1.0 - top_p) * total * (0.5 / V)).to(tl.float32).to(tl.int32, bitcast=True)
            low = _threshold(mine, tl.maximum(low, surely), (top_p * total).to(tl.float32), False, V, BLOCK)
        token = _draw(mine, low, uniform, V, BLOCK)
    token = tl.where(wrong == 0, token, -1)
    tl.store(tokens + row, token)
    if table_row >= 0:
        tl.store(last_tokens + table_row, token)
    if (num_logprobs >= 0) & (wrong == 0):
        log_total = tl.log(_sum_exp(values, raw_top, V, BLOCK))
        place = row * (TOP + 1)
        tl.store(logprobs + place, tl.load(values + token) - raw_top - log_total)
        below = raw_top + 1.0
        after = tl.full([], -1, tl.int32)
        for index in range(1, num_logprobs + 1):
            below, after = _next_highest(values, below, after, V, BLOCK)
            tl.store(top_tokens + place + index, after)
            tl.store(logprobs + place + index, below - raw_top - log_total)


@dataclass(frozen=True, slots=True)
class SamplingTiling:
    """``block``: logits of one iteration."""

    block: int = 8192
    num_warps: int = 16


def sample(
    logits: Any, weights: Any, reals: Any, numbers: Any, adjustments: tuple[Any, Any], last_tokens: Any, tokens: Any,
    top_tokens: Any, logprobs: Any, tiling: SamplingTiling,
) -> None:  # fmt: skip
    """Sample one token for each row of ``logits`` float32 [N, vocab]; ``weights`` is room of the same size.

    ``reals`` float64 [4, capacity]: uniform number, temperature, top_p, min_p. ``numbers`` int32 [5, capacity]: top_k,
    number of logprobs or -1, row of ``last_tokens`` to note the token in or -1, begin and end of its ``adjustments``:
    tokens int32 [entries] and float32 [3, entries] bias, repetition penalty, what to subtract.
    Writes ``tokens`` int32 [N]; ``logprobs`` float32 [N, 1 + most] has the token's own first, and ``top_tokens`` int32
    of the same shape the tokens of the others.
    """
    rows, vocab = logits.shape
    block = min(tiling.block, triton.next_power_of_2(vocab))
    sample_kernel[(rows,)](
        logits, weights, reals, numbers, numbers.shape[1], *adjustments, adjustments[0].shape[0], last_tokens, tokens,
        top_tokens, logprobs, vocab, logprobs.shape[1] - 1, block, num_warps=tiling.num_warps,
    )  # fmt: skip
