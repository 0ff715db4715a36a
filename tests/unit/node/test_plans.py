"""What plans say, applied by the engine's own code, gives the machine's sequences."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from support.ids import block_ids
from support.machines import spec

from kvrelay.engine.sequences import EngineSequences, ScheduledSequence
from kvrelay.grammar.masks import GrammarMasks
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.ids import BlockId, SequenceId
from kvrelay.protocol.messages.engine import SampledTokens, SequenceChange, SequenceFailed, StepPlan, StepResult
from kvrelay.protocol.request import Sequence


@dataclass
class Machine:
    """Sequences that grow, change and leave at random, with up to two plans in flight."""

    rng: random.Random
    writer: PlanWriter = field(default_factory=PlanWriter)
    engine: EngineSequences = field(default_factory=lambda: EngineSequences(GrammarMasks(32)))
    sequences: list[Sequence] = field(default_factory=list)
    in_flight: list[tuple[StepPlan, dict[Sequence, Chunk], StepResult]] = field(default_factory=list)
    step: int = 0

    def arrive(self) -> None:
        one = Sequence(spec(f"r{self.step}", [self.token() for _ in range(self.rng.randint(1, 9))]))
        one.take_blocks(self.blocks(3))
        self.sequences.append(one)

    def token(self) -> int:
        return self.rng.randrange(1000)

    def blocks(self, count: int) -> list[BlockId]:
        return [BlockId(self.rng.randrange(500)) for _ in range(count)]

    def leave(self) -> None:
        """One ends, or is preempted and will be back with other blocks."""
        idle = [one for one in self.sequences if not any(one in chunks for _, chunks, _ in self.in_flight)]
        if idle:
            one = self.rng.choice(idle)
            self.writer.leave(one)
            self.sequences.remove(one)
            if self.rng.random() < 0.5:
                one.take_blocks(self.blocks(2))
                self.sequences.append(one)

    def change(self) -> None:
        """Blocks are appended and exchanged; a token comes from elsewhere."""
        one = self.rng.choice(self.sequences)
        one.block_table.extend(self.blocks(self.rng.randint(0, 2)))
        if self.rng.random() < 0.5:
            place, [block] = self.rng.randrange(len(one.block_table)), self.blocks(1)
            one.block_table[place] = block
            self.writer.replaced(one, [(place, block)])
        if self.rng.random() < 0.3 and not any(one in chunks for _, chunks, _ in self.in_flight):
            one.token_ids.append(self.token())

    def plan(self) -> None:
        """Have the next token of some sequences sampled; the engine does at once what it is told."""
        chosen = [one for one in self.sequences if self.rng.random() < 0.7 and self.may_be_planned(one)]
        chunks = {one: self.chunk(one) for one in chosen}
        self.step += 1
        plan = self.writer.write(self.step, chunks, chunks.values())
        received = decode(encode(plan))
        assert isinstance(received, StepPlan)
        items = self.engine.apply(received)
        self.check(chunks, plan, items)
        outcomes = [SampledTokens(self.sampled(item), []) for item in items]
        self.in_flight.append((plan, chunks, self.engine.result(plan, items, outcomes)))

    def may_be_planned(self, one: Sequence) -> bool:
        return not any(one in chunks and chunks[one].drafts for _, chunks, _ in self.in_flight)

    def chunk(self, one: Sequence) -> Chunk:
        if any(one in chunks for _, chunks, _ in self.in_flight):
            return Chunk(one.num_tokens, 1, True, awaits=True)
        drafts = tuple(self.token() for _ in range(self.rng.randint(0, 3))) if self.rng.random() < 0.4 else None
        return Chunk(one.num_tokens - 1, 1 + len(drafts or ()), True, drafts)

    def sampled(self, item: ScheduledSequence) -> list[int]:
        num_accepted = self.rng.randint(0, len(item.drafts or ()))
        return [*(item.drafts or ())[:num_accepted], self.token()]

    def check(self, chunks: dict[Sequence, Chunk], plan: StepPlan, items: list[ScheduledSequence]) -> None:
        for (one, chunk), scheduled, item in zip(chunks.items(), plan.batch, items, strict=True):
            known = item.sequence.token_ids
            assert list(item.sequence.block_table) == one.block_table
            assert known[: one.num_tokens] == one.token_ids
            assert len(known) == one.num_tokens + scheduled.awaits == chunk.end - len(chunk.drafts or ())
            assert (item.sequence.num_prompt_tokens, item.sequence.sampling) == (one.num_prompt_tokens, one.sampling)
        assert len(self.engine) <= len(self.writer)

    def end(self) -> None:
        """The result of the oldest plan comes in."""
        plan, chunks, result = self.in_flight.pop(0)
        for (one, chunk), item in zip(chunks.items(), plan.batch, strict=True):
            outcome = decode(encode(result)).outcomes[item.id]  # type: ignore[attr-defined]
            if chunk.drafts is not None:
                self.writer.accepted(one, len(outcome.token_ids) - 1)
            one.token_ids += outcome.token_ids
            one.num_computed_tokens = one.num_tokens - 1


@pytest.mark.parametrize("seed", range(20))
def test_the_engine_has_the_machines_sequences_whatever_happens_to_them(seed: int) -> None:
    machine = Machine(random.Random(seed))
    for _ in range(150):
        if len(machine.sequences) < 4:
            machine.arrive()
        machine.rng.choice([machine.arrive, machine.leave, machine.change, machine.change])()
        if len(machine.in_flight) == 2 or (machine.in_flight and machine.rng.random() < 0.5):
            machine.end()
        machine.plan()
    while machine.in_flight:
        machine.end()
    for one in machine.sequences:
        machine.writer.leave(one)
    machine.engine.apply(machine.writer.write(0, [], []))
    assert len(machine.engine) == len(machine.writer) == 0


def sequence(blocks: list[BlockId]) -> Sequence:
    one = Sequence(spec("r", [1, 2, 3]))
    one.take_blocks(blocks)
    return one


def test_a_decode_that_needs_nothing_new_is_told_nothing_but_its_position() -> None:
    writer, one = PlanWriter(), sequence(block_ids(7))
    writer.write(1, [one], [Chunk(0, 3, True)])
    one.token_ids.append(50)
    one.num_computed_tokens = 3
    plan = writer.write(2, [one], [Chunk(3, 1, True)])
    assert (plan.new, plan.changed, plan.left) == ([], [], [])
    assert plan.batch[0].writes_from == 3


def test_a_sequence_that_comes_back_is_a_new_one() -> None:
    writer, one = PlanWriter(), sequence(block_ids(7))
    first = writer.write(1, [one], [Chunk(0, 3, True)])
    writer.leave(one)
    writer.leave(one)
    one.take_blocks(block_ids(9))
    second = writer.write(2, [one], [Chunk(0, 3, True)])
    assert second.left == [first.batch[0].id]
    assert second.new[0].id == second.batch[0].id != first.batch[0].id
    assert second.new[0].block_table == [9]


def test_a_wholly_cached_prompt_writes_nothing() -> None:
    writer, one = PlanWriter(), sequence(block_ids(7))
    one.num_computed_tokens = 3
    assert writer.write(1, [one], [Chunk(2, 1, True)]).batch[0].writes_from == 3


def test_a_block_that_was_exchanged_before_the_engine_knew_it_is_told_once() -> None:
    writer, one = PlanWriter(), sequence(block_ids(7))
    writer.replaced(one, [(0, BlockId(7))])  # the engine does not know the sequence
    plan = writer.write(1, [one], [Chunk(0, 3, True)])
    one.token_ids.append(50)
    one.block_table.append(BlockId(8))
    one.block_table[:] = one.block_table[:0]
    one.block_table.extend(block_ids(4, 9))
    writer.replaced(one, [(0, BlockId(4)), (1, BlockId(9))])
    changed = writer.write(2, [one], [Chunk(3, 1, True)]).changed
    assert changed == [SequenceChange(plan.batch[0].id, block_ids(9), [(0, BlockId(4))], [])]


def test_a_sequence_that_the_engine_was_not_told_of_fails_in_its_step() -> None:
    """As after a step that failed before its plan was taken in."""
    from kvrelay.config.cluster_config import FakeEngineConfig
    from kvrelay.engine.fake import FakeEngine

    writer, one, other = PlanWriter(), sequence(block_ids(7)), sequence(block_ids(8))
    writer.write(1, [one], [Chunk(0, 3, True)])
    one.token_ids.append(50)
    one.block_table.append(BlockId(9))
    engine = FakeEngine(FakeEngineConfig(), 4, 16)
    result = engine.run(writer.write(2, [one, other], [Chunk(3, 1, True), Chunk(0, 3, True)]), lambda layers: None)
    engine.close()
    assert isinstance(result.outcomes[SequenceId(1)], SequenceFailed)
    assert isinstance(result.outcomes[SequenceId(2)], SampledTokens)


def test_as_many_chunks_as_sequences() -> None:
    with pytest.raises(ValueError, match="shorter"):
        PlanWriter().write(1, [sequence(block_ids(7))], [])
