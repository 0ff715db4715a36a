"""The reserve policies with numbers worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import ValidationError

from kvrelay.config.cluster_config import FixedBlocksConfig, NewTokenRatioConfig, SchedulerConfig, SGLangReserveConfig
from kvrelay.node.headroom import FixedBlocks, NewTokenRatio, NoReserve, ReservePolicy, SGLangReserve, reserve_policy


@dataclass
class Grown:
    """A request that has generated some of its tokens."""

    num_output_tokens: int
    max_tokens: int

    @property
    def remaining_output_tokens(self) -> int:
        return max(0, self.max_tokens - self.num_output_tokens)


def new_token_ratio(block_size: int = 16, **config: Any) -> NewTokenRatio:
    return NewTokenRatio(NewTokenRatioConfig(**config), block_size)


def sglang(block_size: int = 16, **config: Any) -> SGLangReserve:
    return SGLangReserve(SGLangReserveConfig(**config), block_size)


ALL: list[ReservePolicy] = [new_token_ratio(), sglang(), FixedBlocks(FixedBlocksConfig()), NoReserve()]


# ---------------------------------------------------------------- new_token_ratio


@pytest.mark.parametrize(
    ("remaining", "blocks"),
    [
        (0, 0),
        (1, 1),  # 0.7 tokens
        (22, 1),  # 15.4
        (23, 2),  # 16.1
        (100, 5),  # 70
        (4096, 180),  # 2867.2 / 16 = 179.2
        (1_000_000, 180),  # clipped
    ],
)
def test_a_share_of_what_may_come_in_whole_blocks(remaining: int, blocks: int) -> None:
    assert new_token_ratio().headroom_blocks([Grown(0, remaining)]) == blocks


def test_each_request_is_rounded_up_by_itself() -> None:
    assert new_token_ratio().headroom_blocks([Grown(0, 1), Grown(99, 100), Grown(5, 28)]) == 1 + 1 + 2


@pytest.mark.parametrize("tenths", range(1, 11))
def test_no_block_more_because_floats_miss_a_whole_number_by_a_little(tenths: int) -> None:
    policy = new_token_ratio(1, init=tenths / 10, min=0.0)
    assert [policy.headroom_blocks([Grown(0, 10 * blocks)]) for blocks in range(50)] == [
        tenths * blocks for blocks in range(50)
    ]


def test_the_share_falls_with_each_step_to_its_lowest() -> None:
    policy = new_token_ratio(init=0.7, min=0.1, decay=0.25)
    levels = []
    for _ in range(4):
        policy.step_scheduled()
        levels.append(policy.level)
    assert levels == pytest.approx([0.45, 0.2, 0.1, 0.1])
    policy.idle()
    assert policy.level == 0.7


def test_after_a_preemption_the_share_is_what_those_that_stay_show() -> None:
    policy = new_token_ratio(block_size=16)
    policy.preempted([Grown(100, 1000), Grown(300, 2000)])
    # (100 + 300 + 16 * 16 * 2) / (1000 + 2000 + 1)
    assert policy.level == pytest.approx(912 / 3001)


def test_after_a_preemption_the_share_is_never_above_init() -> None:
    policy = new_token_ratio(init=0.7)
    policy.preempted([Grown(90, 100)])
    assert policy.level == 0.7


def test_a_preemption_after_which_nobody_is_left_divides_by_nothing() -> None:
    """#6606: division by zero."""
    for policy in ALL:
        policy.preempted([])
        assert 0 <= policy.level <= 16
        policy.preempted([Grown(0, 0)])
        assert 0 <= policy.level <= 16


# ---------------------------------------------------------------- fixed_blocks


def test_fixed_blocks_for_everybody_fewer_with_each_step_all_again_after_a_preemption() -> None:
    policy = FixedBlocks(FixedBlocksConfig(blocks=16, decay=0.5, min_blocks=14))
    requests = [Grown(0, 5), Grown(0, 50_000)]
    seen = []
    for _ in range(6):
        seen.append(policy.headroom_blocks(requests))
        policy.step_scheduled()
    assert seen == [32, 32, 30, 30, 28, 28]
    policy.preempted(requests)
    assert policy.headroom_blocks(requests) == 32


def test_fixed_blocks_default_decay_takes_a_block_away_after_forty_steps() -> None:
    policy = FixedBlocks(FixedBlocksConfig())
    steps = 0
    while policy.headroom_blocks([Grown(0, 1)]) == 16:
        policy.step_scheduled()
        steps += 1
    assert steps == 40


# ---------------------------------------------------------------- sglang


def test_sglang_charges_a_newcomer_all_it_may_generate() -> None:
    policy = sglang()
    assert [policy.charge_blocks(Grown(0, tokens)) for tokens in (1, 16, 17, 4096, 100_000)] == [1, 1, 2, 256, 256]
    assert policy.charge_blocks(Grown(10, 20)) == 1


def test_sglang_share_falls_in_a_line_over_its_decay_steps() -> None:
    policy = sglang(init=0.7, min_factor=0.14, decay_steps=600)
    for _ in range(300):
        policy.step_scheduled()
    assert policy.level == pytest.approx((0.7 + 0.098) / 2)
    for _ in range(400):
        policy.step_scheduled()
    assert policy.level == pytest.approx(0.098)
    policy.idle()
    assert policy.level == 0.7


def test_sglang_after_a_preemption() -> None:
    policy = sglang()
    policy.preempted([Grown(100, 1000), Grown(300, 2000)])
    assert policy.level == pytest.approx((400 + 20 * 2) / 3001)
    policy.preempted([Grown(99, 100)])
    assert policy.level == 1.0


@pytest.mark.parametrize(("block_size", "blocks"), [(1, 60), (16, 6), (20, 3), (32, 3)])
def test_sglang_frees_room_for_its_retract_steps(block_size: int, blocks: int) -> None:
    assert sglang(block_size).room_blocks(3) == blocks


# ---------------------------------------------------------------- all of them


def test_blocks_are_whole_numbers_and_never_negative() -> None:
    """#6606: float blocks, negative remaining tokens."""
    requests = [Grown(0, 0), Grown(7, 7), Grown(3, 1000), Grown(9, 4)]
    for policy in ALL:
        for _ in range(1000):
            policy.step_scheduled()
        counts = [policy.headroom_blocks(requests), policy.charge_blocks(requests[2]), policy.room_blocks(2)]
        counts += [policy.headroom_blocks([]), policy.headroom_blocks(requests[:2])]
        assert all(type(count) is int and count >= 0 for count in counts)


def test_the_config_names_the_policy() -> None:
    kinds = {name: type(reserve_policy(SchedulerConfig(reserve_policy=name), 16)) for name in NAMES}
    assert kinds == NAMES


NAMES: dict[Any, type] = {
    "new_token_ratio": NewTokenRatio,
    "fixed_blocks": FixedBlocks,
    "sglang": SGLangReserve,
    "none": NoReserve,
}


@pytest.mark.parametrize(
    "section",
    [
        {"new_token_ratio": {"init": 1.1}},
        {"new_token_ratio": {"min": -0.1}},
        {"new_token_ratio": {"init": 0.2, "min": 0.3}},
        {"new_token_ratio": {"decay": -1.0}},
        {"new_token_ratio": {"clip_max_new_tokens": 0}},
        {"fixed_blocks": {"blocks": -1}},
        {"fixed_blocks": {"blocks": 2, "min_blocks": 3}},
        {"sglang": {"decay_steps": 0}},
        {"sglang": {"retract_decode_steps": 0}},
        {"sglang": {"init": -0.5}},
        {"sglang": {"min_factor": 1.5}},
    ],
)
def test_impossible_parameters_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SchedulerConfig(**section)
