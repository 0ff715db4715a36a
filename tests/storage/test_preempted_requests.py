"""A node with the real engine and a real store: preempted all the time, its requests come out as if left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import uvloop
from storage_rooms import Room
from support.token_rules import strict_rules

from decode_node.machine import DecodeMachine
from decode_node.preemption import Preemption
from decode_node.request import DecodeRequest
from decode_node.schedule import Schedule
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.engine.compute_thread import ComputeThread
from kvrelay.engine.interface import Engine
from kvrelay.engine.load import load_engine
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import CoreEvent, Received, RunStep, StopRequested
from kvrelay.node.storage import StorageIO
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import ROUTER, BlockId, NodeId, RequestId
from kvrelay.protocol.messages.node_to_router import Register, TokensOut
from kvrelay.protocol.messages.router_to_node import Generate
from kvrelay.protocol.request import FinishReason, RequestSpec, SamplingParams, TokenLogprobs
from kvrelay.runtime.shell import Shell
from kvrelay.runtime.transport import Transport
from kvstore.offload.kv_offloader import num_staging_slots
from kvstore.storage.interface import KVStore

BLOCK_SIZE = 8
NUM_BLOCKS = 128
PATIENCE_S = 200.0
EVERY = 3
STORED = {"backend": "file", "resume": "storage", "min_read_tokens": 1, "timeout_s": 10.0, "read_timeout_s": 10.0}
"""For the node, which need not know what kind of store it has been given."""

# Seeds whose draws are all 6e-5 or more from any boundary between two tokens: there rounding could decide.
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "ignore_eos": True},
    "seeded": {"seed": 401, "ignore_eos": True},
    "filtered": {"seed": 402, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "ignore_eos": True},
    "penalties": {
        "seed": 1103,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
    },
    "stop token": {"temperature": 0.0, "stop_token_ids": [72]},
    "token rules": {"seed": 805, "temperature": 0.9, "token_rules": strict_rules(384), "ignore_eos": True},
    "minimum": {"seed": 704, "temperature": 0.7, "min_tokens": 20, "stop_token_ids": list(range(0, 384, 3))},
}
MAX_TOKENS = 40


@dataclass
class Served:
    """What came out of one run."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    finished: dict[str, FinishReason | None] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)


class RouterStub:
    """In place of the transport: keeps what the node sends, and stops it when all requests have finished."""

    def __init__(self, shell: Shell, served: Served, num_requests: int) -> None:
        self._shell = shell
        self._served = served
        self._num_requests = num_requests

    def connect(self, peer: str, address: str) -> None:
        pass

    disconnect = connect

    def send(self, peer: str, message: object) -> None:
        for output in message.outputs if isinstance(message, TokensOut) else ():
            assert output.index == len(self._served.tokens.setdefault(output.request_id, []))
            self._served.tokens[output.request_id] += output.token_ids
            self._served.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
            if output.finish_reason is not None:
                self._served.finished[output.request_id] = output.finish_reason
                if len(self._served.finished) == self._num_requests:
                    self._shell.post(StopRequested())


class Forgetful:
    """The machine, without a prefix cache worth the name: whatever nobody holds is free at once, and overwritten."""

    def __init__(self, machine: DecodeMachine, engine: Engine) -> None:
        self._machine = machine
        assert isinstance(engine.memory, KVMemory)
        self._planes = engine.memory.planes

    def handle(self, event: CoreEvent, now: float) -> Sequence[object]:
        actions = self._machine.handle(event, now)
        kv = self._machine.kv
        kv.unpin(kv.allocate(kv.num_free + kv.num_evictable))
        free = [block for block in range(kv.num_blocks) if kv._pool.ref_count(BlockId(block)) < 0]
        self._planes[:, :, free] = np.full(self._planes.shape[-1] // 4, 3.0, np.float32).view(np.uint8)
        return actions


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> NodeConfig:
    path = tmp_path_factory.mktemp("preempted") / "tiny"
    write_tiny_checkpoint(path, "qwen2")
    return NodeConfig.model_validate(
        {
            "name": "m0",
            "role": "mixed",
            "port": 1,
            "model": {"path": str(path)},
            "cache": {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE},
            "storage": STORED,
        }
    )


@pytest.fixture(scope="module")
def engine(node: NodeConfig) -> Iterator[Engine]:
    engine = load_engine(node, lambda done, total: None)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(node: NodeConfig, engine: Engine) -> Served:
    """The undisturbed run, without a store."""
    config = node.model_copy(update={"storage": type(node.storage)()})
    served = serve(config, engine, None, 0)
    assert served.counters["preemptions"] == 0
    return served


def requests(epoch: int) -> list[RequestSpec]:
    rng = np.random.default_rng(5)
    return [
        RequestSpec(
            request_id=RequestId(name),
            epoch=epoch,
            prompt_token_ids=rng.integers(0, 384, 5 + 9 * number).tolist(),
            sampling=SamplingParams(**{"max_tokens": MAX_TOKENS, "seed": 0, "num_logprobs": 2, **sampling}),
        )
        for number, (name, sampling) in enumerate(SAMPLING.items())
    ]


def serve(node: NodeConfig, engine: Engine, store: KVStore | None, epoch: int) -> Served:
    """Run all requests to their ends on a node of their own."""
    served = Served()

    async def bounded() -> None:
        await asyncio.wait_for(_serve(node, engine, store, requests(epoch), served), PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())
    return served


async def _serve(
    node: NodeConfig, engine: Engine, store: KVStore | None, specs: list[RequestSpec], served: Served
) -> None:
    registration = Register(
        node_id=NodeId(node.name),
        incarnation="1",
        role=node.role,
        address=node.address,
        pid=1,
        model="m",
        max_model_len=engine.max_model_len,
        max_num_seqs=node.scheduler.max_num_seqs,
        num_blocks=node.cache.fixed_num_blocks,
        geometry=engine.geometry,
        vocab_size=engine.vocab_size,
    )
    machine = DecodeMachine(node, registration)
    shell = Shell(machine if store is None else Forgetful(machine, engine), clock=Clock())
    compute = ComputeThread(engine, shell.post_threadsafe, layer_events=False)
    shell.handle_with(RunStep, lambda action: compute.submit(action.plan))
    router = cast(Transport, RouterStub(shell, served, len(specs)))
    for spec in specs:
        shell.post(Received(ROUTER, Generate(request=spec)))
    compute.start()
    try:
        if store is None:
            await shell.run(router)
        else:
            num_slots = num_staging_slots(node.storage, engine.geometry.block_bytes)
            async with StorageIO(store, engine.memory, num_slots, shell.post, Clock()) as storage:
                storage.handle_with(shell)
                await shell.run(router)
    finally:
        compute.stop()
    machine.assert_quiescent()
    served.counters = machine.load().counters


def preempt_often(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the decode that came last give up its blocks in every third step; return how many full ones, each time."""
    make_room, release_victim = Preemption.make_room, Preemption._release_victim
    num_steps = 0
    num_full: list[int] = []

    def with_a_victim(self: Preemption, schedule: Schedule, now: float, *, is_staging: bool) -> set[DecodeRequest]:
        nonlocal num_steps
        stalled = make_room(self, schedule, now, is_staging=is_staging)
        num_steps += 1
        decoding = self._requests.decoding
        if num_steps % EVERY == 0 and decoding and not schedule.preempted:
            victim = next(reversed(decoding))
            self._release_victim(victim)
            self._requeue([victim], "growth", schedule, now)
        return stalled

    def counted(self: Preemption, victim: DecodeRequest) -> None:
        num_full.append(min(victim.num_computed_tokens, len(victim.token_ids)) // BLOCK_SIZE)
        release_victim(self, victim)

    monkeypatch.setattr(Preemption, "make_room", with_a_victim)
    monkeypatch.setattr(Preemption, "_release_victim", counted)
    return num_full


@pytest.mark.fault("F10")
def test_preempted_every_three_steps_and_read_back_each_time(
    room: Room, node: NodeConfig, engine: Engine, alone: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_full = preempt_often(monkeypatch)
    store = room.store(engine.geometry, num_blocks=400)

    served = serve(node, engine, store, 1)

    assert served.tokens == alone.tokens
    assert served.finished == alone.finished
    assert_close(served, alone)
    assert served.counters["preemptions"] == len(num_full) >= MAX_TOKENS // (2 * EVERY)
    assert_read_as_computed(served.counters, num_full, engine.geometry.block_bytes)
    assert_written_as_computed(served, engine.geometry)


def test_what_the_undisturbed_run_is_about(alone: Served) -> None:
    lengths = {name: len(tokens) for name, tokens in alone.tokens.items()}
    assert lengths.pop("stop token") == 18
    assert 20 < lengths.pop("minimum") < MAX_TOKENS
    assert set(lengths.values()) == {MAX_TOKENS}
    ended = {name for name, reason in alone.finished.items() if reason is FinishReason.STOP}
    assert ended == {"stop token", "minimum"}


def assert_close(served: Served, alone: Served) -> None:
    """Check the logprobs of the tokens and of the most likely ones, whichever of two that are as likely comes first."""
    for name, expected in alone.logprobs.items():
        for ours, theirs in zip(served.logprobs[name], expected, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, rel=0, abs=1e-4)
            assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, rel=0, abs=1e-4)


def assert_read_as_computed(counters: dict[str, float], num_full: list[int], block_bytes: int) -> None:
    """Each preempted request got all its full blocks back from the store; of the prompts it had none."""
    prompt_blocks = [len(spec.prompt_token_ids) // BLOCK_SIZE for spec in requests(0)]
    assert counters["prefix_hit_tokens"] == 0
    assert counters["kv_loads"] == sum(map(bool, [*num_full, *prompt_blocks]))
    assert counters["kv_blocks_not_loaded"] == sum(prompt_blocks)
    assert counters["kv_blocks_loaded"] == counters["store_hit_blocks"] == sum(num_full)
    assert counters["store_read_bytes"] == sum(num_full) * block_bytes
    assert counters["store_missed_blocks"] == counters["store_corrupt_blocks"] == counters["store_errors"] == 0


def assert_written_as_computed(served: Served, geometry: KVGeometry) -> None:
    """Every full block was written once: all tokens but the newest have KV."""
    counters, hasher = served.counters, BlockHasher(geometry.model_digest, BLOCK_SIZE)
    blocks = {
        block_hash
        for spec in requests(0)
        for block_hash in hasher.hashes([*spec.prompt_token_ids, *served.tokens[spec.request_id]][:-1])
    }
    assert counters["kv_blocks_saved"] == counters["store_written_blocks"] == len(blocks)
    assert counters["kv_bytes_saved"] == counters["store_written_bytes"] == len(blocks) * geometry.block_bytes
    assert counters["kv_blocks_not_saved"] == counters["store_present_blocks"] == counters["store_failed_blocks"] == 0
