"""A decode node's scheduler on a harness: requests put where a test wants them, steps taken one by one."""

from __future__ import annotations

from typing import Any

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.resume_policy import LoadPolicy
from decode_node.schedule import Schedule, Scheduler
from kvrelay.config.cluster_config import SchedulerConfig, SpeculativeConfig, StorageConfig
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.request import RequestSpec, SamplingParams
from kvstore.blocks.block_hash import BlockHasher
from kvstore.blocks.kv_cache import KVCache
from kvstore.offload.kv_offloader import KVOffloader

QUIET = {"reserve_policy": "none", "watermark": 0.0}
"""No reserve: tests of one rule are not disturbed by another."""


class Desk:
    """A scheduler of ``num_blocks`` blocks of ``block_size`` tokens; ``step`` does the part of machine and engine."""

    def __init__(
        self, num_blocks: int = 32, block_size: int = 4, speculative: dict[str, Any] | None = None, **config: Any
    ) -> None:
        self.now = 100.0
        self.kv = KVCache(num_blocks)
        self.hasher = BlockHasher("model", block_size)
        settings = SchedulerConfig(**{**QUIET, **config})
        storage = StorageConfig()
        offloader, loads = KVOffloader(storage, 1, self.kv, Outbox()), LoadPolicy(storage, block_size)
        self.scheduler = Scheduler(
            settings, SpeculativeConfig(**(speculative or {})), self.kv, self.hasher, offloader, loads
        )
        self.finished: list[DecodeRequest] = []
        self._next_token = 1000

    # ------------------------------------------------------------ putting requests somewhere

    def request(
        self,
        name: str,
        prompt: int | list[int],
        status: DecodeStatus,
        output: int = 0,
        max_tokens: int = 1000,
        priority: int = 0,
    ) -> DecodeRequest:
        """Return a request that has generated ``output`` tokens and has no blocks."""
        token_ids = self.tokens(prompt) if isinstance(prompt, int) else prompt
        spec = RequestSpec(
            request_id=name,
            epoch=1,
            prompt_token_ids=token_ids,
            output_token_ids=self.tokens(output),
            sampling=SamplingParams(max_tokens=max_tokens, seed=0),
            priority=priority,
        )
        known = [*spec.prompt_token_ids, *spec.output_token_ids]
        return DecodeRequest(spec, self.hasher.hashes(known), status, self.now)

    def tokens(self, count: int) -> list[int]:
        """Return tokens nobody had before."""
        self._next_token += count
        return list(range(self._next_token - count, self._next_token))

    def decode(self, name: str, prompt: int = 4, output: int = 1, **options: Any) -> DecodeRequest:
        """Let a request decode: all its tokens but the newest have their KV in its blocks."""
        request = self.request(name, prompt, DecodeStatus.RUNNING_DECODE, output, **options)
        self._give_blocks(request, len(request.token_ids) - 1)
        self.scheduler.decoding[request] = None
        return request

    def prefill(self, name: str, prompt: int | list[int], computed: int = 0, **options: Any) -> DecodeRequest:
        """Let a request be in the midst of its prefill."""
        request = self.request(name, prompt, DecodeStatus.RUNNING_PREFILL, **options)
        self._give_blocks(request, len(request.token_ids))
        request.num_computed_tokens = computed
        self.scheduler.prefilling[request] = None
        self.scheduler.order.arrived(request, request.priority, request.num_tokens, self.now)
        self.scheduler.order.admitted(request, request.num_tokens)
        self.scheduler.order.ready(request, request.num_uncomputed_tokens)
        return request

    def receive(self, name: str, prompt: int, **options: Any) -> DecodeRequest:
        """Let a request be reserved for a prefill node: its tokens are not known."""
        request = self.request(name, 0, DecodeStatus.RECEIVING, **options)
        self._give_blocks(request, prompt)
        self.scheduler.receiving[request] = None
        return request

    def wait(self, name: str, prompt: int | list[int], **options: Any) -> DecodeRequest:
        """Let a request wait for blocks."""
        request = self.request(name, prompt, DecodeStatus.WAITING, **options)
        self.scheduler.waiting.add(request)
        return request

    def _give_blocks(self, request: DecodeRequest, num_tokens: int) -> None:
        request.take_blocks(self.kv.allocate(-(-num_tokens // self.hasher.block_size)))
        request.num_computed_tokens = num_tokens

    # ------------------------------------------------------------ steps

    def schedule(self) -> Schedule:
        """Decide a step, and move statuses as the machine does."""
        schedule = self.scheduler.schedule(self.now)
        for request in schedule.preempted:
            request.lifecycle.move(DecodeStatus.PREEMPTED, self.now)
        for request in schedule.admitted:
            request.lifecycle.move(DecodeStatus.RUNNING_PREFILL, self.now)
        self.kv.check_invariants()
        return schedule

    def step(self) -> Schedule:
        """Decide a step and let it be computed."""
        schedule = self.schedule()
        for request, chunk in zip(schedule.requests, schedule.chunks, strict=True):
            request.num_computed_tokens = chunk.end
            if request in self.scheduler.prefilling:
                self.scheduler.publish(request)
                if chunk.samples:
                    self.scheduler.leave_prefill(request)
                    self._to_decode(request)
            if chunk.samples:
                request.token_ids += self.tokens(1)
                self._finish_if_done(request)
        return schedule

    def arrive(self, request: DecodeRequest, num_tokens: int) -> None:
        """Let the KV and the hand-off of a reserved request come in."""
        request.token_ids = self.tokens(num_tokens + 1)
        request.num_prompt_tokens = num_tokens
        request.num_computed_tokens = num_tokens
        del self.scheduler.receiving[request]
        self._to_decode(request)

    def _to_decode(self, request: DecodeRequest) -> None:
        request.lifecycle.move(DecodeStatus.RUNNING_DECODE, self.now)
        self.scheduler.decoding[request] = None

    def _finish_if_done(self, request: DecodeRequest) -> None:
        if request.remaining_output_tokens == 0:
            del self.scheduler.decoding[request]
            self.kv.unpin(request.block_table)
            self.finished.append(request)

    def run(self, max_steps: int = 1000) -> int:
        """Take steps until nobody is left; return how many."""
        for number in range(max_steps):
            if not self.scheduler.num_holding and not self.scheduler.waiting:
                return number
            schedule = self.step()
            assert schedule.chunks, "a step with nothing in it while somebody waits"
        raise AssertionError(f"still there after {max_steps} steps")


def names(requests: Any) -> list[str]:
    """Return the ids of ``requests``."""
    return [request.spec.request_id for request in requests]
