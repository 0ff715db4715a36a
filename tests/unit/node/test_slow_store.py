"""A store made slow on purpose: calls are late, reads not later than their deadline."""

from __future__ import annotations

from typing import Any

import pytest
from support.loops import Inbox, run

from kvrelay.config.cluster_config import FakeEngineConfig
from kvrelay.config.faults import FaultsConfig
from kvrelay.config.storage import StorageConfig
from kvrelay.engine.fake import FakeEngine
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, LoadKV, StageKV, StoreCounted, StoreKV
from kvrelay.node.storage import StorageIO, injected_delay
from kvrelay.protocol.ids import BlockId
from kvstore.storage.factory import make_store

HASHES = [b"h" * 32]
BLOCKS = [BlockId(0)]


async def answers_to(*actions: StageKV | StoreKV | LoadKV, **faults: Any) -> list[object]:
    """Return the answers to ``actions``, each begun when the one before is answered."""
    engine = FakeEngine(FakeEngineConfig(), block_size=4, num_blocks=4)
    inbox, clock = Inbox(), Clock()
    answers = []
    try:
        config, delay = StorageConfig(backend="memory"), injected_delay(FaultsConfig(**faults))
        store = make_store(config, engine.geometry, clock, delay=delay)
        async with StorageIO(store, engine.memory, 1, inbox, clock) as storage:
            for action in actions:
                storage.perform(action)
                while isinstance(answer := await inbox.next(), StoreCounted):
                    pass
                answers.append(answer)
    finally:
        engine.close()
    return answers


SAVE_AND_LOAD = (
    StageKV(1, BLOCKS, [0]),
    StoreKV(1, HASHES, [0]),
    LoadKV(2, HASHES, BLOCKS, min_blocks=1, timeout_s=10.0),
)


def test_a_slow_call_succeeds_if_there_is_time_for_it() -> None:
    expected = [KVStaged(1), KVStored(1, 1, 1), KVLoaded(2, 1)]
    assert run(answers_to(*SAVE_AND_LOAD)) == expected
    assert run(answers_to(*SAVE_AND_LOAD, store_delay_rate=1.0, store_delay_s=0.01)) == expected


def test_a_read_is_answered_by_its_deadline_and_the_log_names_it(caplog: pytest.LogCaptureFixture) -> None:
    load = LoadKV(2, HASHES, BLOCKS, min_blocks=1, timeout_s=0.0501)
    assert run(answers_to(load, store_delay_rate=1.0, store_delay_s=3600.0)) == [KVLoaded(2, 0)]
    assert "no answer within 0.0501 s" in caplog.text
