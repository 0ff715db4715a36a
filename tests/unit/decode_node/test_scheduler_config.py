"""Every key of the scheduler's config is read: changing it changes what happens (#6606 read one of its never)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel
from support.scheduling import Desk, names
from support.world import World

from kvrelay.config.cluster_config import SchedulerConfig


def admitted(**config: Any) -> list[str]:
    """Return who gets in beside a decode of 40 tokens to come, into 14 free blocks, after ten steps."""
    harness = Desk(num_blocks=16, **config)
    harness.decode("a", prompt=3, max_tokens=40)
    for _ in range(10):
        harness.step()
    harness.wait("b", 8, max_tokens=16)
    harness.wait("c", 8, max_tokens=16)
    return names(harness.schedule().admitted)


def preempted(**config: Any) -> list[str]:
    """Return who gives way among three decodes, and then who waits in which order behind a newcomer."""
    harness = Desk(num_blocks=4, **config)
    for name, prompt, output, priority in (("a", 4, 1, 9), ("b", 3, 5, 0), ("c", 4, 1, 0)):
        harness.decode(name, prompt=prompt, output=output, priority=priority)
    harness.wait("new", 4)
    return [*names(harness.schedule().preempted), "|", *names(harness.requests.waiting)]


def steps(**config: Any) -> list[int]:
    """Return the sizes of the first steps of three prompts."""
    harness = Desk(num_blocks=64, **config)
    for name in "abc":
        harness.wait(name, 12, max_tokens=4)
    return [sum(chunk.num_tokens for chunk in harness.step().chunks) for _ in range(4)]


def queue(**config: Any) -> list[str]:
    """Return who waits in which order when the first, which is the longest, has been overtaken by 900 tokens."""
    harness = Desk(**config)
    for name, length in (("long", 24), ("middle", 20), ("short", 8)):
        harness.wait(name, length)
    harness.requests.order.passed(0, 900)
    harness.wait("new", 10)
    return names(harness.requests.waiting.ordered(harness.now))


def level(policy: str, num_steps: int, **config: Any) -> float:
    """Return the reserve's level after some steps of a decode."""
    options: dict[str, Any] = {policy: config}
    harness = Desk(num_blocks=64, reserve_policy=policy, **options)
    harness.decode("a", max_tokens=100)
    for _ in range(num_steps):
        harness.step()
    return harness.scheduler.reserve.level


def order(**config: Any) -> list[str]:
    """Return who waits in which order when an old request of no urgency meets a new one."""
    harness = Desk(enable_priority_scheduling=True, **config)
    harness.wait("old", 4, priority=1)
    harness.now += 5.0
    harness.wait("new", 4, priority=0)
    return names(harness.requests.waiting.ordered(harness.now))


def victims(**config: Any) -> list[str]:
    """Return who gives way to make room for decodes that stay, under policy sglang."""
    harness = Desk(num_blocks=20, reserve_policy="sglang", sglang=config)
    for name in "abcde":
        harness.decode(name, prompt=16, output=1)
    return names(harness.schedule().preempted)


def first_token_s(**config: Any) -> float:
    """Return when the last of some prompts has its first token, on a prefill node whose pool is nearly full."""
    with World(cache={"num_blocks": 24}, scheduler=config, engine={"eos_every": 0}) as world:
        for _ in range(4):
            world.submit(20, 30)
        start_s = world.now
        world.run_until(lambda: all(client.token_ids for client in world.clients.values()))
        return world.now - start_s


EFFECTS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "max_num_batched_tokens": (lambda: steps(max_num_batched_tokens=8), lambda: steps(max_num_batched_tokens=9)),
    "max_num_seqs": (lambda: steps(max_num_seqs=1), lambda: steps(max_num_seqs=2)),
    "prefill_policy": (
        lambda: first_token_s(prefill_policy="dedicated"),
        lambda: first_token_s(prefill_policy="shared"),
    ),
    "prefill_order": (lambda: queue(prefill_order="fifo"), lambda: queue(prefill_order="shortest_first")),
    "prefill_overtake_tokens": (
        lambda: queue(prefill_overtake_tokens=3000),
        lambda: queue(prefill_overtake_tokens=10_000),
    ),
    "reserve_policy": (lambda: admitted(reserve_policy="none"), lambda: admitted(reserve_policy="sglang")),
    "new_token_ratio.init": (lambda: level("new_token_ratio", 0, init=0.5), lambda: level("new_token_ratio", 0)),
    "new_token_ratio.min": (
        lambda: level("new_token_ratio", 5, decay=0.5, min=0.3),
        lambda: level("new_token_ratio", 5, decay=0.5),
    ),
    "new_token_ratio.decay": (lambda: level("new_token_ratio", 5, decay=0.1), lambda: level("new_token_ratio", 5)),
    "new_token_ratio.clip_max_new_tokens": (
        lambda: admitted(reserve_policy="new_token_ratio", new_token_ratio={"clip_max_new_tokens": 1}),
        lambda: admitted(reserve_policy="new_token_ratio", new_token_ratio={"init": 1.0}),
    ),
    "fixed_blocks.blocks": (lambda: level("fixed_blocks", 0, blocks=3), lambda: level("fixed_blocks", 0)),
    "fixed_blocks.decay": (lambda: level("fixed_blocks", 5, decay=1.0), lambda: level("fixed_blocks", 5)),
    "fixed_blocks.min_blocks": (
        lambda: level("fixed_blocks", 5, decay=9.0, min_blocks=7),
        lambda: level("fixed_blocks", 5, decay=9.0),
    ),
    "sglang.init": (lambda: level("sglang", 0, init=0.5), lambda: level("sglang", 0)),
    "sglang.min_factor": (
        lambda: level("sglang", 9, decay_steps=5, min_factor=0.5),
        lambda: level("sglang", 9, decay_steps=5),
    ),
    "sglang.decay_steps": (lambda: level("sglang", 5, decay_steps=10), lambda: level("sglang", 5)),
    "sglang.retract_decode_steps": (
        lambda: victims(retract_decode_steps=1),
        lambda: victims(retract_decode_steps=8),
    ),
    "sglang.clip_max_new_tokens": (
        lambda: admitted(reserve_policy="sglang", sglang={"clip_max_new_tokens": 1}),
        lambda: admitted(reserve_policy="sglang"),
    ),
    "watermark": (lambda: admitted(watermark=0.0), lambda: admitted(watermark=0.8)),
    "preemption_order": (
        lambda: preempted(preemption_order="latest_first"),
        lambda: preempted(preemption_order="shortest_output_first"),
    ),
    "requeue": (lambda: preempted(requeue="front"), lambda: preempted(requeue="tail")),
    "enable_priority_scheduling": (preempted, lambda: preempted(enable_priority_scheduling=True)),
    "priority_aging_s": (lambda: order(priority_aging_s=1.0), lambda: order(priority_aging_s=100.0)),
}
"""For each key two settings of it."""


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += keys_of(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def test_there_is_an_effect_for_every_key() -> None:
    assert list(EFFECTS) == keys_of(SchedulerConfig)


@pytest.mark.parametrize("key", EFFECTS)
def test_the_key_has_an_effect(key: str) -> None:
    one, other = EFFECTS[key]
    assert one() != other()
    assert one() == one()
