"""The deterministic mode: the same bits in any batch, chunking and schedule on the card, and what they cost."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from golden.cases import CASES
from steps import Case, Shape, operations, step_of_one_sequence

from gpu_check import decode, prefill
from gpu_check.context import Context
from gpu_check.driving import Driver, Mode, engine_of, sequence
from gpu_check.float8 import kv_of
from gpu_check.gemm import SHAPES
from gpu_check.golden import check_case
from kvrelay.engine.device import invariant
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.invariant import InvariantOperations, InvariantProjections
from kvrelay.engine.device.weights import Linear

MODE = Mode(deterministic=True)

BATCHES = (1, 32, 128)

ROWS = (1, 2, 16, 64, 127, 128, 129, 255, 256, 257, 700)
"""Rows of products: within one tile, over several, and on both sides of where pieces have programs of their own."""

HEADS = (Shape(32, 8, 128, 16, "bfloat16", 4096), Shape(14, 2, 64, 16, "float16", 4096))


def run(context: Context) -> None:
    """Check, then measure; AssertionError names what is wrong after all has been checked."""
    if context.interpreted:
        from interpreting import sum_in_order  # noqa: PLC0415

        sum_in_order()
    wrong: list[str] = []
    _check_products(context, wrong)
    for shape in (Shape(dtype="float16", max_len=1024),) if context.tiny else HEADS:
        for window in (None, 100):
            _check_attention(context, shape, window, wrong)
    check_case(context, CASES[0], True, False, wrong, MODE)
    _check_engine(context, wrong)
    assert not wrong, wrong
    _measure_products(context)
    decode.measure(context, "deterministic", "llama3-8b", BATCHES, MODE)
    context.clean_up()
    prefill.measure(context, "deterministic", "llama3-8b", (40,) if context.tiny else (2048, 8192), mode=MODE)


def _note(context: Context, what: str, is_equal: bool, wrong: list[str]) -> None:
    context.report.add("deterministic", what, "the same bits" if is_equal else "DIFFERENT BITS")
    if not is_equal:
        wrong.append(what)


def _near(context: Context, what: str, ours: torch.Tensor, theirs: torch.Tensor, wrong: list[str]) -> None:
    distance = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    context.report.add("deterministic", what, distance, "relative distance", 1e-2)
    if not distance <= 1e-2:  # never for NaN
        wrong.append(what)


def _dtype(context: Context) -> str:
    """Return bfloat16, which Triton's interpreter does not multiply."""
    return "float16" if context.interpreted else "bfloat16"


def _check_products(context: Context, wrong: list[str]) -> None:
    """Compare rows of a large product with the same rows of smaller ones, at both ends of it."""
    dtype = _dtype(context)
    project = InvariantProjections(context.framework, operations(Shape())[0], 1e-6, dtype)
    most = 40 if context.tiny else ROWS[-1]
    for name, (rows, columns) in {"tiny": (64, 1100)}.items() if context.tiny else SHAPES.items():
        weight = Linear(context.random(rows, columns, dtype=dtype, scale=0.02), context.random(rows, dtype=dtype))
        x = context.random(most, columns, dtype=dtype)
        whole, added = project._product(x, weight, "float32"), torch.zeros((most, rows), device=x.device)
        project.add(added, x, weight)
        _near(context, f"{name}, product", whole, x.float() @ weight.weight.float().t() + weight.bias, wrong)
        is_equal = torch.equal(added, whole)
        for count in [count for count in ROWS if count <= most]:
            for chosen in (slice(count), slice(most - count, most)):
                is_equal &= torch.equal(project._product(x[chosen], weight, "float32"), whole[chosen])
        _note(context, f"{name}, products of {', '.join(map(str, ROWS))} rows", is_equal, wrong)


def _check_attention(context: Context, shape: Shape, window: int | None, wrong: list[str]) -> None:
    """Compare a prompt as one chunk with its tokens in other chunks, and one by one, few and many at once."""
    length = 70 if context.tiny else 2500
    ours = InvariantOperations(context.framework, shape.head_shape(), shape.limits(max_num_seqs=64))
    case = Case(shape, [(0, length)], ours.tile_rows, device=context.torch_device)
    step, tables, layer = case.build()
    queries = case.random(length, shape.heads, shape.dim)
    whole = ours.attention(queries, layer, step, tables, window)
    plain = operations(shape, context.framework)[0]
    tiled = Case(shape, [(0, length)], plain.tile_rows, device=context.torch_device).build()[0]
    name = f"attention, {shape.heads}/{shape.groups} heads of {shape.dim}, window {window}"
    _near(context, name, whole, plain.attention(queries, layer, tiled, tables, window), wrong)

    def attended(spans: list[tuple[int, int]]) -> torch.Tensor:
        """Attend from rows of the same sequence."""
        step = step_of_one_sequence(spans, ours.tile_rows, context.torch_device)
        chosen = torch.cat([queries[before : before + count] for before, count in spans])
        return ours.attention(chosen, layer, step, tables, window)

    is_equal = True
    for chunk, first in ((33, 0), (7, 3)) if context.tiny else ((97, 0), (512, 1), (1000, 13)):
        spans = [(before, min(chunk, length - before)) for before in range(first, length, chunk)]
        spans.sort(key=lambda span: span[1] > 1)
        rows = torch.cat([torch.arange(before, before + count) for before, count in spans]).to(whole.device)
        is_equal &= torch.equal(attended(spans), whole[rows])
    _note(context, f"{name}, in chunks", is_equal, wrong)
    step_of = max(1, length // 40)
    positions = sorted({0, 31, 63, 64, length - 1, *range(5, length, step_of)})
    is_equal = True
    for count in (1, 7, invariant.MOST_SPREAD, invariant.MOST_SPREAD + 1, len(positions)):
        chosen = positions[-count:]
        is_equal &= torch.equal(attended([(position, 1) for position in chosen]), whole[chosen])
    _note(context, f"{name}, one by one", is_equal, wrong)


def _check_engine(context: Context, wrong: list[str]) -> None:
    """Compare keys, values and log probabilities of a request: in chunks, beside others, and recomputed."""
    length, num_tokens = (30, 4) if context.tiny else (1200, 24)
    engine = engine_of(
        context, "qwen3-0.6b", num_blocks=16 if context.tiny else 1200, max_num_seqs=9, tokens=2 * length,
        max_model_len=2 * length, decode_graphs=(1, 9), chunk_graphs=(64,), dtype=_dtype(context),
        mode=MODE,
    )  # fmt: skip
    prompt = np.random.default_rng(0).integers(0, engine.vocab_size, length).tolist()
    few = 2 if context.tiny else 8
    expected = _bits(context, engine, prompt, [], num_tokens, 1 << 20)
    known = [*prompt, *expected[2]]
    ways = {
        "alone in chunks of 64": _bits(context, engine, prompt, [], num_tokens, 64),
        "alone in chunks of 333": _bits(context, engine, prompt, [], num_tokens, 333),
        f"beside {few} others": _bits(context, engine, prompt, [prompt[:7]] * few, num_tokens, 1 << 20),
    }
    results = {name: _same(expected, bits, 0) for name, bits in ways.items()}
    half = num_tokens // 2
    again = _bits(context, engine, known[: length + half], [], num_tokens - half, 97)
    results["recomputed in chunks of 97 after half of the output"] = _same(expected, again, half)
    engine.close()
    for name, is_equal in results.items():
        _note(context, f"engine, keys, values and log probabilities, {name}", is_equal, wrong)


def _bits(
    context: Context, engine: DeviceEngine, prompt: list[int], others: list[list[int]], num_tokens: int, chunk: int
) -> tuple[torch.Tensor, list[float], list[int]]:
    """Return keys and values of all tokens but the last, log probabilities and tokens."""
    driver, told = Driver(engine), []
    one = sequence(prompt, "one", num_logprobs=1)
    company = [sequence(other, f"other {index}", temperature=1.0) for index, other in enumerate(others)]
    while one.num_output_tokens < num_tokens:
        running = [(each, min(chunk, each.num_tokens - each.num_computed_tokens)) for each in (*company, one)]
        sampled = engine.run(driver.plan(running), lambda layers: None).sampled
        told += [entry.logprob for entry in sampled[-1].logprobs]
        driver.finish(sampled)
    kv = kv_of(context, engine, list(one.block_table), one.num_computed_tokens).clone()
    driver.give_back([one, *company])
    return kv, told, one.token_ids[len(prompt) :]


def _same(
    expected: tuple[torch.Tensor, list[float], list[int]], found: tuple[torch.Tensor, list[float], list[int]], skip: int
) -> bool:
    """Return whether both are the same, but for the first ``skip`` outputs, which ``found`` has in its prompt."""
    return torch.equal(expected[0], found[0]) and (expected[1][skip:], expected[2][skip:]) == found[1:]


def _measure_products(context: Context) -> None:
    dtype = _dtype(context)
    project = InvariantProjections(context.framework, operations(Shape())[0], 1e-6, dtype)
    for name, (rows, columns) in {"tiny": (64, 32)}.items() if context.tiny else SHAPES.items():
        copies = 2 if context.tiny else max(2, int(6e8 // (2 * rows * columns)))
        weights = [Linear(context.random(rows, columns, dtype=dtype, scale=0.02), None) for _ in range(copies)]
        for count in (2,) if context.tiny else (1, 32, 128, 256, 2048):
            if name == "lm_head" and count > 256:
                continue
            x = context.random(count, columns, dtype=dtype)
            limit = weights[0].weight.nbytes / context.copy_bytes_per_s * 1e6
            limit = max(limit, 2 * count * rows * columns / context.gemm_flops_per_s * 1e6)
            works = [partial(project._product, x, one, dtype) for one in weights]
            seconds = context.seconds_in_graph(works, repeats=5)
            context.report.add("deterministic", f"{name}, {count} rows, own GEMM", seconds * 1e6, "us", limit)
