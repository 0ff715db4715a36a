"""Whether KV is read from the store or computed."""

from __future__ import annotations

from typing import Any

import pytest

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.resume_policy import ReloadPolicy
from kvrelay.config.storage import StorageConfig
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import RequestSpec, SamplingParams

NOW = 100.0


def policy(**config: Any) -> ReloadPolicy:
    return ReloadPolicy(StorageConfig(**{"backend": "file", "min_read_tokens": 1, **config}), 4)


def request(status: DecodeStatus, num_blocks: int = 10, num_stored: int = 0) -> DecodeRequest:
    spec = RequestSpec(
        request_id=RequestId("r"), epoch=1, prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1, seed=0)
    )
    made = DecodeRequest(spec, [bytes([place]) * 32 for place in range(num_blocks)], status, NOW)
    made.num_stored_blocks = num_stored
    return made


def preempted(num_stored: int = 10) -> DecodeRequest:
    return request(DecodeStatus.PREEMPTED, num_stored=num_stored)


def test_a_new_request_reads_all_that_may_be_there() -> None:
    assert policy().num_blocks(request(DecodeStatus.WAITING), 3, NOW) == 7


def test_a_preempted_one_reads_what_was_written() -> None:
    assert policy().num_blocks(preempted(8), 3, NOW) == 5
    assert policy().num_blocks(preempted(3), 3, NOW) == 0
    assert policy().num_blocks(preempted(0), 3, NOW) == 0


def test_without_a_store_nothing_is_read() -> None:
    assert policy(backend="none").num_blocks(request(DecodeStatus.WAITING), 0, NOW) == 0


def test_too_little_is_not_worth_it() -> None:
    assert policy(min_read_tokens=13).num_blocks(preempted(4), 0, NOW) == 4
    assert policy(min_read_tokens=17).num_blocks(preempted(4), 0, NOW) == 0


@pytest.mark.parametrize(("resume", "expected"), [("storage", 10), ("recompute", 0), ("auto", 10)])
def test_resume_says_how_preempted_requests_come_back(resume: str, expected: int) -> None:
    assert policy(resume=resume).num_blocks(preempted(), 0, NOW) == expected
    assert policy(resume=resume).num_blocks(request(DecodeStatus.WAITING), 0, NOW) == 10


def test_auto_takes_what_has_been_faster() -> None:
    chosen = policy(resume="auto")
    chosen.prefill_speed.add(1000, 1.0, NOW)
    assert chosen.num_blocks(preempted(), 0, NOW) == 10  # nobody knows how fast the store is
    chosen.reload_speed.add(100, 1.0, NOW)
    assert chosen.num_blocks(preempted(), 0, NOW) == 0
    assert chosen.num_blocks(preempted(), 0, NOW + 61) == 10  # it may be better now
    for _ in range(20):
        chosen.reload_speed.add(5000, 1.0, NOW)
    assert chosen.num_blocks(preempted(), 0, NOW) == 10


def test_only_those_who_will_read_wait_for_the_write() -> None:
    waiting = preempted()
    waiting.is_saving = True
    assert policy(resume="storage").waits(waiting)
    assert not policy(resume="auto").waits(waiting)
    assert policy(resume="auto").num_blocks(waiting, 0, NOW) == 0
