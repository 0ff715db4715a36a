"""A decode node's scheduler on a harness: requests put where a test wants them, steps taken one by one."""

from __future__ import annotations

from typing import Any

from decode_node.machine import DecodeMachine
from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.schedule import Schedule
from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import RunStep, StepDone
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.engine import SampledTokens
from kvrelay.protocol.messages.prefill_to_decode import HandOff
from kvrelay.protocol.request import RequestSpec, SamplingParams
from support.machines import node_config, registration, result_of


class Desk:
    """The parts of a mixed node's machine with ``num_blocks`` blocks of ``block_size`` tokens; ``step`` is an engine.

    There is no reserve unless ``config`` says so: tests of one rule are not disturbed by another.
    """

    def __init__(
        self, num_blocks: int = 32, block_size: int = 4, speculative: dict[str, Any] | None = None, **config: Any
    ) -> None:
        cache = {"num_blocks": num_blocks, "block_size": block_size, "output_caching": False}
        node = node_config(Role.MIXED, cache=cache, speculative=speculative or {}, scheduler=config)
        machine = DecodeMachine(node, registration(node))
        self.now = 100.0
        self.kv, self.requests, self.scheduler = machine.kv, machine.requests, machine.scheduler
        self.finished: list[DecodeRequest] = []
        self._hasher, self._steps, self._outbox = machine._hasher, machine._steps, machine._outbox
        self._block_size = block_size
        self._next_token = 1000

    @property
    def num_preempted(self) -> int:
        """Preemptions so far."""
        return sum(self.scheduler.preemption.counts.values())

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
            request_id=RequestId(name),
            epoch=1,
            prompt_token_ids=token_ids,
            output_token_ids=self.tokens(output),
            sampling=SamplingParams(max_tokens=max_tokens, seed=0),
            priority=priority,
        )
        known = [*spec.prompt_token_ids, *spec.output_token_ids]
        return DecodeRequest(spec, self._hasher.hashes(known), status, self.now)

    def tokens(self, count: int) -> list[int]:
        """Return tokens nobody had before."""
        self._next_token += count
        return list(range(self._next_token - count, self._next_token))

    def decode(self, name: str, prompt: int = 4, output: int = 1, **options: Any) -> DecodeRequest:
        """Let a request decode: all its tokens but the newest have their KV in its blocks."""
        request = self.request(name, prompt, DecodeStatus.RESERVING, output, **options)
        self._receive(request, len(request.token_ids) - 1)
        self.requests.move(request, DecodeStatus.RUNNING_DECODE, self.now)
        return request

    def prefill(self, name: str, prompt: int | list[int], computed: int = 0, **options: Any) -> DecodeRequest:
        """Let a request be in the midst of its prefill, with blocks of its own for all its tokens."""
        request = self.wait(name, prompt, **options)
        self.scheduler.admission._take_blocks(request, self._num_blocks(len(request.token_ids)), [])
        request.num_computed_tokens = computed
        self.requests.move(request, DecodeStatus.RUNNING_PREFILL, self.now)
        return request

    def receive(self, name: str, prompt: int, **options: Any) -> DecodeRequest:
        """Let a request be reserved for a prefill node: its tokens are not known."""
        request = self.request(name, 0, DecodeStatus.RESERVING, **options)
        self._receive(request, prompt)
        return request

    def wait(self, name: str, prompt: int | list[int], **options: Any) -> DecodeRequest:
        """Let a request wait for blocks."""
        request = self.request(name, prompt, DecodeStatus.WAITING, **options)
        self.requests.add(request)
        return request

    def _receive(self, request: DecodeRequest, num_tokens: int) -> None:
        request.take_blocks(self.kv.allocate(self._num_blocks(num_tokens)))
        request.num_computed_tokens = num_tokens
        self.requests.add(request)
        self.requests.move(request, DecodeStatus.RECEIVING, self.now)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    # ------------------------------------------------------------ steps

    def schedule(self) -> Schedule:
        """Decide a step that is never computed."""
        schedule = self.scheduler.schedule(self.now)
        self.kv.check_invariants()
        return schedule

    def step(self) -> Schedule:
        """Decide a step and let it be computed: what samples gets a token nobody had before."""
        self._outbox.now = self.now
        schedule = self._steps.start_one()
        self.kv.check_invariants()
        for action in self._outbox.take():
            if isinstance(action, RunStep):
                sampled = [SampledTokens(self.tokens(1) if item.samples else [], []) for item in action.plan.batch]
                self._steps.ended(StepDone(result_of(action.plan, sampled)))
        self._outbox.take()
        self.finished += [request for request in schedule.requests if request.status is DecodeStatus.ENDED]
        return schedule

    def arrive(self, request: DecodeRequest, num_tokens: int) -> None:
        """Let the KV and the hand-off of a reserved request come in."""
        spec = RequestSpec(
            request_id=request.spec.request_id,
            epoch=1,
            prompt_token_ids=self.tokens(num_tokens),
            output_token_ids=self.tokens(1),
            sampling=request.sampling,
        )
        request.hand_off(HandOff(request=spec, num_cached_tokens=0))
        self.requests.move(request, DecodeStatus.RUNNING_DECODE, self.now)

    def run(self, max_steps: int = 1000) -> int:
        """Take steps until nobody is left; return how many."""
        for number in range(max_steps):
            if not self.requests.num_holding and not self.requests.waiting:
                return number
            schedule = self.step()
            assert schedule.chunks, "a step with nothing in it while somebody waits"
        raise AssertionError(f"still there after {max_steps} steps")


def names(requests: Any) -> list[str]:
    """Return the ids of ``requests``."""
    return [request.spec.request_id for request in requests]
