"""One step after the other flattened into the same arrays."""

from __future__ import annotations

import random

import numpy as np
from engine_runs import engine_sequence
from support.ids import block_ids

from kvrelay.engine.batch import BatchAssembler, RaggedBatch, StepLimits
from kvrelay.engine.sequences import EngineSequence, ScheduledSequence

LIMITS = StepLimits(block_size=4, num_blocks=500, max_model_len=200, vocab_size=5000)


def placed(rng: random.Random, num_tokens: int, num_slots: int) -> EngineSequence:
    blocks = rng.sample(block_ids(*range(LIMITS.num_blocks)), -(-num_slots // LIMITS.block_size))
    return engine_sequence(rng.choices(range(1000), k=num_tokens), blocks)


def scheduled(rng: random.Random) -> ScheduledSequence:
    """Return a decode, with guesses or without, a chunk of a prompt, or one computed for its logits only."""
    num_known = rng.randint(2, 60)
    kind = rng.choice(["decode", "decode", "decode", "guesses", "chunk", "again"])
    drafts = tuple(rng.choices(range(1000), k=rng.randint(0, 5))) if kind == "guesses" else None
    one = placed(rng, num_known, num_known + 5)
    start = rng.randrange(num_known) if kind == "chunk" else num_known - 1
    num_tokens = rng.randint(1, num_known - start) if kind == "chunk" else 1 + len(drafts or ())
    writes_from = num_known if kind == "again" else start
    return ScheduledSequence(one, start, num_tokens, start + num_tokens >= num_known, writes_from, drafts)


def assert_flat(batch: RaggedBatch, items: list[ScheduledSequence]) -> None:
    """Compare each row with what the sequence it belongs to says."""
    rows: dict[int, tuple[int, int, int | None]] = {}
    sampling: list[int] = []
    for span in batch.spans:
        item = items[span.index]
        known = [*item.sequence.token_ids, *(item.drafts or ())]
        for offset in range(item.num_tokens):
            position = item.start + offset
            block = item.sequence.block_table[position // LIMITS.block_size]
            slot = block * LIMITS.block_size + position % LIMITS.block_size
            is_new = position >= item.writes_from
            rows[span.first_row + offset] = known[position], position, slot if is_new else None
    assert sorted(rows) == list(range(len(batch.token_ids)))
    written = np.arange(len(rows)) if batch.written_rows is None else batch.written_rows
    slots = dict(zip(written.tolist(), batch.slot_mapping.tolist(), strict=True))
    for row, known_row in rows.items():
        assert (batch.token_ids[row], batch.positions[row], slots.get(row)) == known_row
    last_rows = {span.index: span.first_row + span.num_tokens - 1 for span in batch.spans}
    for index, item in enumerate(items):
        if item.samples:
            num_drafts = len(item.drafts or ())
            sampling += range(last_rows[index] - num_drafts, last_rows[index] + 1)
    assert batch.sampling_rows.tolist() == sampling


def test_every_step_is_flattened_right_whatever_came_before() -> None:
    rng, assembler = random.Random(7), BatchAssembler(LIMITS)
    for _ in range(300):
        items = [scheduled(rng) for _ in range(rng.choice([1, 3, 20]))]
        assert_flat(assembler.assemble(items), items)


def test_a_step_like_the_one_before_uses_its_memory_and_copies_no_block_table() -> None:
    rng, assembler = random.Random(7), BatchAssembler(LIMITS)
    items = [ScheduledSequence(placed(rng, 30, 40), 29, 1, True, 29) for _ in range(8)]
    first, second = assembler.assemble(items), assembler.assemble(items)
    for name in ("token_ids", "positions", "slot_mapping"):
        assert np.shares_memory(getattr(first, name), getattr(second, name))
    for span in second.spans:
        table = np.frombuffer(items[span.index].sequence.block_table, np.int32)
        assert np.shares_memory(span.block_table, table) and len(span.block_table) == 8
