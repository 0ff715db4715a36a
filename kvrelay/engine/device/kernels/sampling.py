"""Sampling on the device: one program takes one row of logits from its penalties to its token and log probabilities.

The order of operations and the random numbers are those of ``kvrelay.engine.sampler``. Thresholds of top_k and top_p
are found by a search on the bits of the weights, four ways at a time: the weights are not negative, so their bits are
ordered as they are, and the search ends at the exact value. After two passes over the row few weights are left between
the bounds; they are copied, and later passes read only those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from kvrelay.engine.device import operations

LOG2E = tl.constexpr(1.4426950408889634)
HIGHEST = tl.constexpr(3.4028234663852886e38)
ONE_BITS = tl.constexpr(0x3F800000)
GREEDY_BELOW = tl.constexpr(1e-5)
NOT_FINITE = tl.constexpr(operations.NOT_FINITE)
NONE_LEFT = tl.constexpr(operations.NONE_LEFT)


@triton.jit
def _highest(values, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the highest of ``V`` values, where it first is, and how many are NaN or plus infinity."""
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        value = tl.load(values + start + columns, mask=start + columns < V, other=-float("inf"))
        wrong += tl.where(value < float("inf"), 0, 1)
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
def _weigh(values, weights, top, inverse, low, V: tl.constexpr, BLOCK: tl.constexpr):
    """Write exp((value - top) * inverse) to ``weights``; return what ``_mass`` would."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    last = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        value = tl.load(values + start + columns, mask=inside, other=-float("inf"))
        weight = tl.exp2((value - top) * inverse * LOG2E)
        tl.store(weights + start + columns, weight, mask=inside)
        kept = (weight.to(tl.int32, bitcast=True) >= low) & (weight > 0)
        total += tl.where(kept, weight, 0.0)
        last = tl.where(kept, start + columns, last)
    return tl.sum(total, 0).to(tl.float64), tl.max(last, 0)


@triton.jit
def _mass(weights, low, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of the weights whose bits are ``low`` or more, and the last place of one."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    last = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        weight = tl.load(weights + start + columns, mask=start + columns < V, other=0.0)
        kept = (weight.to(tl.int32, bitcast=True) >= low) & (weight > 0)
        total += tl.where(kept, weight, 0.0)
        last = tl.where(kept, start + columns, last)
    return tl.sum(total, 0).to(tl.float64), tl.max(last, 0)


@triton.jit
def _narrow(
    source, target, count, most, low, high, above, goal, COUNT: tl.constexpr, V: tl.constexpr, KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the bounds ``low`` and ``high`` of a threshold closer together, by one pass over ``source``.

    ``source`` has ``V`` weights, or, if that is 0, column i of ``source`` [most, BLOCK] has ``count[i]``. Those that
    reach ``high`` count as ``above``. Returns bounds, what is above them, and how many weights of each column lie
    between the old bounds: with ``KEEP`` they are copied to ``target``, which may be ``source``, since the copies of a
    column are never ahead of its reads.
    """
    columns = tl.arange(0, BLOCK)
    if KEEP:
        columns = tl.max_contiguous(columns, 1)  # one layout for loads and stores, or they meet in shared memory
    step = tl.maximum((high - low) // 4, 1)
    first = low + step
    second = tl.minimum(first + step, high)
    third = tl.minimum(second + step, high)
    over_first = tl.zeros([BLOCK], tl.float32)
    over_second = tl.zeros([BLOCK], tl.float32)
    over_third = tl.zeros([BLOCK], tl.float32)
    kept = tl.zeros([BLOCK], tl.int32)
    for row in range(0, most):
        there = row < count
        if V > 0:
            there = row * BLOCK + columns < V
        weight = tl.load(source + row * BLOCK + columns, mask=there, other=0.0)
        bits = weight.to(tl.int32, bitcast=True)
        share = weight
        if COUNT:
            share = tl.full([BLOCK], 1.0, tl.float32)
        share = tl.where(bits < high, share, 0.0)
        over_first += tl.where(bits >= first, share, 0.0)
        over_second += tl.where(bits >= second, share, 0.0)
        over_third += tl.where(bits >= third, share, 0.0)
        if KEEP:
            between = there & (bits >= low) & (bits < high)
            tl.store(target + kept * BLOCK + columns, weight, mask=between)
            kept += between.to(tl.int32)
    mass_first = above + tl.sum(over_first, 0)
    mass_second = above + tl.sum(over_second, 0)
    mass_third = above + tl.sum(over_third, 0)
    has_first = mass_first >= goal
    has_second = mass_second >= goal
    has_third = mass_third >= goal
    new_low = tl.where(has_first, tl.where(has_second, tl.where(has_third, third, second), first), low)
    new_high = tl.where(has_first, tl.where(has_second, tl.where(has_third, high, third), second), first)
    new_above = tl.where(
        has_first, tl.where(has_second, tl.where(has_third, above, mass_third), mass_second), mass_first
    )
    return new_low, new_high, new_above, kept


@triton.jit
def _threshold(weights, between, low, goal, COUNT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the highest bits that at least ``goal`` of the weights, by number or by sum, have or exceed.

    ``low`` is the answer if no higher bits are. ``between`` is room for as many weights.
    """
    rows: tl.constexpr = (V + BLOCK - 1) // BLOCK
    high = tl.full([], ONE_BITS + 1, tl.int32)
    above = tl.zeros([], tl.float32)
    low, high, above, _unused = _narrow(weights, between, 0, rows, low, high, above, goal, COUNT, V, False, BLOCK)
    low, high, above, _unused = _narrow(weights, between, 0, rows, low, high, above, goal, COUNT, V, False, BLOCK)
    part: tl.constexpr = BLOCK // 2  # copying needs registers too
    parts: tl.constexpr = (V + part - 1) // part
    low, high, above, left = _narrow(weights, between, 0, parts, low, high, above, goal, COUNT, V, True, part)
    while high - low > 1:
        tl.debug_barrier()
        most = tl.max(left, 0)
        low, high, above, left = _narrow(between, between, left, most, low, high, above, goal, COUNT, 0, True, part)
    return low


@triton.jit
def _draw(weights, low, total, last, uniform, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return where the distribution function of the weights from ``low`` on, see ``_mass``, passes ``uniform``."""
    columns = tl.arange(0, BLOCK)
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
        value = tl.minimum(value, HIGHEST)
        value -= tl.load(changes + 2 * capacity + entry, mask=inside, other=0.0)
        tl.store(adjusted + place, value, mask=inside)
    tl.debug_barrier()


@triton.jit
def _mask(adjusted, bits, V: tl.constexpr, BLOCK: tl.constexpr):
    """Set the values whose bit is 0 to minus infinity."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        place = start + columns
        inside = place < V
        word = tl.load(bits + place // 32, mask=inside, other=0)
        value = tl.load(adjusted + place, mask=inside, other=0.0)
        tl.store(adjusted + place, tl.where((word >> (place % 32)) & 1 == 1, value, -float("inf")), mask=inside)
    tl.debug_barrier()


@triton.jit
def _num_reaching(values, least, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many values are ``least`` or more."""
    columns = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        value = tl.load(values + start + columns, mask=inside, other=-float("inf"))
        count += (inside & (value >= least)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _store_logprobs(
    values, token, top, num_alternatives, top_tokens, logprobs, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the log probability of ``token``, and behind it those of the highest values and which tokens they are."""
    log_total = tl.log(_sum_exp(values, top, V, BLOCK))
    tl.store(logprobs, tl.load(values + token) - top - log_total)
    below = top + 1.0
    after = tl.full([], -1, tl.int32)
    for index in range(1, num_alternatives + 1):
        below, after = _next_highest(values, below, after, V, BLOCK)
        tl.store(top_tokens + index, after)
        tl.store(logprobs + index, below - top - log_total)


@triton.jit(do_not_specialize=["num_alternatives"])
def prompt_logprobs_kernel(
    logits, targets, num_alternatives, ranks, top_tokens, logprobs, V: tl.constexpr, TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * V
    target = tl.load(targets + row)
    top, _unused, wrong = _highest(values, V, BLOCK)
    is_finite = (wrong == 0) & (top > -float("inf"))
    rank = _num_reaching(values, tl.load(values + target), V, BLOCK)
    tl.store(ranks + row, tl.where(is_finite, rank, NOT_FINITE))
    if is_finite:
        place = row * (TOP + 1)
        _store_logprobs(values, target, top, num_alternatives, top_tokens + place, logprobs + place, V, BLOCK)


@triton.jit(do_not_specialize=["capacity", "entries", "words"])
def sample_kernel(
    logits, room, reals, numbers, capacity, adjusted_tokens, changes, entries, masks, words, last_tokens, tokens,
    top_tokens, logprobs, V: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * V
    width: tl.constexpr = (V + BLOCK - 1) // BLOCK * BLOCK
    mine = room + row * 2 * width
    uniform = tl.load(reals + row)
    temperature = tl.load(reals + capacity + row)
    top_p = tl.load(reals + 2 * capacity + row)
    min_p = tl.load(reals + 3 * capacity + row)
    top_k = tl.load(numbers + row)
    num_logprobs = tl.load(numbers + capacity + row)
    table_row = tl.load(numbers + 2 * capacity + row)
    begin = tl.load(numbers + 3 * capacity + row)
    end = tl.load(numbers + 4 * capacity + row)
    mask = tl.load(numbers + 5 * capacity + row).to(tl.int64)
    is_changed = (end > begin) | (mask >= 0)
    raw_top, token, wrong = _highest(values, V, BLOCK)
    top = raw_top
    if is_changed:
        _adjust(values, mine, adjusted_tokens, changes, entries, begin, end, V, BLOCK)
        if mask >= 0:
            _mask(mine, masks + mask * words, V, BLOCK)
        top, token, _unused = _highest(mine, V, BLOCK)
    failure = tl.where(top == -float("inf"), NONE_LEFT, 0)
    failure = tl.where((wrong > 0) | (raw_top == -float("inf")), NOT_FINITE, failure)
    if (temperature >= GREEDY_BELOW) & (failure == 0):
        inverse = (1.0 / temperature).to(tl.float32)
        low = tl.maximum(min_p.to(tl.float32).to(tl.int32, bitcast=True), 0)
        source = values
        if is_changed:
            source = mine
        total, last = _weigh(source, mine, top, inverse, low, V, BLOCK)
        tl.debug_barrier()
        if (top_k > 0) & (top_k < V):
            low = _threshold(mine, mine + width, low, top_k.to(tl.float32), True, V, BLOCK)
            total, last = _mass(mine, low, V, BLOCK)
        if top_p < 1.0:
            tl.debug_barrier()
            # all below this together are less than 1 - top_p of the total; half of it, for what rounding may do
            surely = ((1.0 - top_p) * total * (0.5 / V)).to(tl.float32).to(tl.int32, bitcast=True)
            goal = (top_p * total).to(tl.float32)
            low = _threshold(mine, mine + width, tl.maximum(low, surely), goal, False, V, BLOCK)
            total, last = _mass(mine, low, V, BLOCK)
        token = _draw(mine, low, total, last, uniform, V, BLOCK)
    token = tl.where(failure == 0, token, failure)
    tl.store(tokens + row, token)
    if table_row >= 0:
        tl.store(last_tokens + table_row, token)
    if (num_logprobs >= 0) & (failure == 0):
        place = row * (TOP + 1)
        _store_logprobs(values, token, raw_top, num_logprobs, top_tokens + place, logprobs + place, V, BLOCK)


@dataclass(frozen=True, slots=True)
class SamplingTiling:
    """``block``: logits of one iteration."""

    block: int = 8192
    num_warps: int = 16

    def room(self, vocab_size: int) -> int:
        """Return how many float32 a row needs besides its logits: its weights, and those between two bounds."""
        return 2 * self.block_of(vocab_size) * int(triton.cdiv(vocab_size, self.block_of(vocab_size)))

    def block_of(self, vocab_size: int) -> int:
        """Return the logits of one iteration over a vocabulary that may be smaller than ``block``."""
        return min(self.block, int(triton.next_power_of_2(vocab_size)))


def sample(
    logits: Any, room: Any, reals: Any, numbers: Any, adjustments: tuple[Any, Any], masks: Any, last_tokens: Any,
    tokens: Any, top_tokens: Any, logprobs: Any, tiling: SamplingTiling,
) -> None:  # fmt: skip
    """Sample one token for each row of ``logits`` float32 [N, vocab]; ``room`` float32 [N, tiling.room(vocab)].

    ``reals`` float64 [4, capacity]: uniform number, temperature, top_p, min_p. ``numbers`` int32 [6, capacity]: top_k,
    number of logprobs or -1, row of ``last_tokens`` to note the token in or -1, begin and end of its ``adjustments``:
    tokens int32 [entries] and float32 [3, entries] bias, repetition penalty, what to subtract; row of ``masks`` int32
    [masks, words], whose bits say which tokens may be sampled, or -1.
    Writes ``tokens`` int32 [N]; ``logprobs`` float32 [N, 1 + most] has the token's own first, and ``top_tokens`` int32
    of the same shape the tokens of the others.
    """
    rows, vocab = logits.shape
    sample_kernel[(rows,)](
        logits, room, reals, numbers, numbers.shape[1], *adjustments, adjustments[0].shape[0], masks, masks.shape[1],
        last_tokens, tokens, top_tokens, logprobs, vocab, logprobs.shape[1] - 1, tiling.block_of(vocab),
        num_warps=tiling.num_warps,
    )  # fmt: skip


def prompt_logprobs(
    logits: Any, targets: Any, num_alternatives: int, ranks: Any, top_tokens: Any, logprobs: Any,
    tiling: SamplingTiling,
) -> None:  # fmt: skip
    """Write the log probabilities of ``targets`` int32 [N] in ``logits`` float32 [N, vocab]; see ``sample``.

    ``ranks`` int32 [N]: how many tokens are at least as likely, or NOT_FINITE.
    """
    rows, vocab = logits.shape
    prompt_logprobs_kernel[(rows,)](
        logits, targets, num_alternatives, ranks, top_tokens, logprobs, vocab, logprobs.shape[1] - 1,
        tiling.block_of(vocab), num_warps=tiling.num_warps,
    )  # fmt: skip
