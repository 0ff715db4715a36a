"""A whole cluster in virtual time: the real machines on real pools, with a fake network and a fake engine.

Everything that happens follows from the seed and from what a test does. A World is cheap (a small one runs in a few
milliseconds), so a test may run many.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from kvrelay.config.cluster_config import (
    CacheConfig,
    ClusterSettings,
    EngineConfig,
    FakeEngineConfig,
    KVEventsConfig,
    NodeConfig,
    Role,
    SchedulerConfig,
    SpeculativeConfig,
    StorageConfig,
    TransferConfig,
)
from kvrelay.engine.fake import reference_prompt_logprobs, reference_tokens
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import StopRequested, TimerFired
from kvrelay.machine.laws import require
from kvrelay.protocol.ids import PeerId, RequestId, peer_name
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.request import FinishReason, PromptLogprobs, RequestSpec, SamplingParams, TokenLogprobs
from kvrelay.recording.recorder import Recorder
from router.events import (
    CacheResetEnded,
    CacheResetRequested,
    CancelRequested,
    ClientGone,
    Deliver,
    DumpReported,
    NewRequest,
    PromptLogprobsDelivered,
    RequestEnded,
    RequestErrored,
    Submitted,
    TokensDelivered,
)
from router.limits import Limits
from router.machine import RouterSettings
from router.request import RequestTimer
from support.fake_link import FakeLink, Parcel, Payload
from support.fake_store import FakeStore
from support.processes import MessagerProcess, NodeProcess, Process, RouterProcess

EOS = 1
VOCAB_SIZE = 512
PLANS_IN_FLIGHT = 1
"""How many plans engines take at a time unless a test says otherwise."""


@dataclass
class Client:
    """One request from outside, and what came of it."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    expected: list[int]
    submitted_s: float
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ended: RequestEnded | RequestErrored | None = None
    ended_s: float = 0.0
    num_cached_tokens: int = 0
    stop_token_id: int | None = None
    nodes: list[str] = field(default_factory=list)
    """The nodes that were chosen first: P and D, or a mixed node."""
    expected_prompt: PromptLogprobs | None = None
    """The logprobs of the prompt in a clean run, if they are wanted and there are any."""
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)

    @property
    def error(self) -> str | None:
        """The code of the error it ended with."""
        return self.ended.error.code if isinstance(self.ended, RequestErrored) else None

    @property
    def finish_reason(self) -> FinishReason | None:
        """How it ended well."""
        return self.ended.finish_reason if isinstance(self.ended, RequestEnded) else None

    def take(self, delivery: object, now: float) -> None:
        """Take what the router delivers. Nothing may come after the end."""
        assert self.ended is None, f"{self.request_id}: {delivery} after {self.ended}"
        if isinstance(delivery, PromptLogprobsDelivered):
            assert not self.token_ids
            self.prompt_logprobs.append(delivery.logprobs)
        elif isinstance(delivery, TokensDelivered):
            self.token_ids += delivery.token_ids
            self.logprobs += delivery.logprobs
            self.num_cached_tokens = delivery.num_cached_tokens
            self.stop_token_id = delivery.stop_token_id
        else:
            assert isinstance(delivery, RequestEnded | RequestErrored)
            self.ended, self.ended_s = delivery, now

    def check(self) -> None:
        """The oracle: all tokens of a clean run, or a part of them and one typed error (or the client left)."""
        assert self.ended is not None, f"{self.request_id} has not ended"
        assert self.token_ids == self.expected[: len(self.token_ids)], f"{self.request_id}: wrong tokens"
        self._check_prompt()
        if self.finish_reason not in (None, FinishReason.ABORT):
            assert self.token_ids == self.expected, f"{self.request_id}: {self.finish_reason} too soon"
            assert self.finish_reason is (FinishReason.STOP if self._stops_at_last() else FinishReason.LENGTH)

    def _check_prompt(self) -> None:
        """All logprobs of the prompt, once and in order, or as many as came before an error."""
        expected, got, end = self.expected_prompt, self.prompt_logprobs, 1
        for piece in got:
            assert piece.start == end < piece.end, f"{self.request_id}: logprobs of the prompt are out of order"
            end = piece.end
            assert expected is not None and end <= expected.end
        if expected is None:
            return
        if got:
            whole = joined(got)
            assert expected.starting_at(1).ranks.startswith(whole.ranks), f"{self.request_id}: wrong ranks"
            assert expected.token_ids.startswith(whole.token_ids), f"{self.request_id}: wrong tokens of the prompt"
            assert expected.logprobs.startswith(whole.logprobs), f"{self.request_id}: wrong logprobs of the prompt"
        if self.token_ids or self.finish_reason not in (None, FinishReason.ABORT):
            assert end == expected.end, f"{self.request_id}: logprobs of the prompt are missing"

    def _stops_at_last(self) -> bool:
        if not self.expected:
            return False
        last, eos = self.expected[-1], [] if self.sampling.ignore_eos else self.sampling.eos_token_ids
        return last in eos or last in self.sampling.stop_token_ids


def joined(pieces: list[PromptLogprobs]) -> PromptLogprobs:
    """Return consecutive pieces, one or more, as one."""
    parts = zip(*((piece.ranks, piece.token_ids, piece.logprobs) for piece in pieces), strict=True)
    ranks, token_ids, logprobs = (b"".join(part) for part in parts)
    return PromptLogprobs(pieces[0].start, pieces[0].num_alternatives, ranks, token_ids, logprobs)


class World:
    """``with World(...) as world:`` start a cluster, do things to it, and at the end everything must be well.

    Well means: every client got its tokens or one error, all blocks are back, nobody holds or owes anything.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        prefill: int = 1,
        decode: int = 1,
        mixed: int = 0,
        cache: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        transfer: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
        speculative: dict[str, Any] | None = None,
        storage: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
        router: dict[str, Any] | None = None,
        nodes: dict[str, dict[str, Any]] | None = None,
        careful: bool = False,
        layers_at_once: int = 1,
        record: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.careful = careful
        self.history: deque[tuple[float, PeerId, object]] = deque(maxlen=400)
        self.clients: dict[str, Client] = {}
        self.cache_resets: list[CacheResetEnded] = []
        self.dumps: list[DumpReported] = []
        self.processes: dict[PeerId, Process] = {}
        self.dead: list[Process] = []
        self.layers_at_once = layers_at_once
        self.recorders: list[Recorder] | None = [] if record else None
        self.store = FakeStore(random.Random(seed ^ 0x5709))
        self.link = FakeLink(random.Random(~seed), self.after, lambda: self.now, self._arrive)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._undelivered: dict[str, list[tuple[Process, Message]]] = {}
        self._incarnations = itertools.count(1)
        self._request_numbers = itertools.count()
        self._sections = {
            "cache": {"block_size": 4, "num_blocks": 64, **(cache or {})},
            "scheduler": {"max_num_batched_tokens": 64, "max_num_seqs": 16, **(scheduler or {})},
            "speculative": speculative or {},
            "storage": storage or {},
            "transfer": {"lease_s": 8.0, "timeout_s": 10.0, **(transfer or {})},
            "engine": {
                "vocab_size": VOCAB_SIZE,
                "num_layers": 2,
                "num_kv_heads": 1,
                "head_dim": 8,
                "step_s": 0.001,
                "prefill_token_s": 0.0001,
                "decode_token_s": 0.0002,
                "eos_every": 64,
                "max_plans_in_flight": PLANS_IN_FLIGHT,
                **(engine or {}),
            },
        }
        self._overrides = nodes or {}
        self._limits = Limits(**{"request_timeout_s": 120.0, **(limits or {})})
        self._router_options = router or {}
        self.router = self._start_router()
        roles = {Role.PREFILL: ("p", prefill), Role.DECODE: ("d", decode), Role.MIXED: ("m", mixed)}
        self.nodes: dict[str, NodeProcess] = {}
        for role, (letter, count) in roles.items():
            for number in range(count):
                self.start(f"{letter}{number}", role)
        self.run_until(self.is_ready)

    # ------------------------------------------------------------ time

    def after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` in ``delay_s``."""
        heapq.heappush(self._heap, (self.now + delay_s, next(self._sequence), callback))

    def run_until(self, condition: Callable[[], object], limit_s: float = 300.0) -> None:
        """Let things happen until ``condition`` holds. It must do so within ``limit_s``."""
        deadline = self.now + limit_s
        while not condition():
            at_s, _, callback = heapq.heappop(self._heap)
            if at_s > deadline:
                raise AssertionError(f"did not happen within {limit_s} s\n{self.told()}")
            self.now = at_s
            callback()

    def run_until_sent(self, message: str, nth: int = 1) -> None:
        """Let things happen until ``message`` is on its way for the ``nth`` time from now on."""
        target = self.link.sent[message] + nth
        self.run_until(lambda: self.link.sent[message] >= target)

    def run_until_arrived(self, message: str, nth: int = 1) -> None:
        """Let things happen until ``message`` has been handled for the ``nth`` time from now on."""
        target = self.link.arrived[message] + nth
        self.run_until(lambda: self.link.arrived[message] >= target)

    def run_for(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        over: list[bool] = []
        self.after(seconds, lambda: over.append(True))
        self.run_until(lambda: over, seconds + 1)

    # ------------------------------------------------------------ processes

    def is_ready(self) -> bool:
        """Return whether every node is registered."""
        return len(list(self.router.machine.node_table)) == len(self.nodes)

    def config(self, name: str, role: Role, port: int) -> NodeConfig:
        """Return the config of a node."""
        sections = {
            key: {**value, **self._overrides.get(name, {}).get(key, {})} for key, value in self._sections.items()
        }
        return NodeConfig(
            name=name,
            role=role,
            port=port,
            host=self._overrides.get(name, {}).get("host", "127.0.0.1"),
            cache=CacheConfig(**sections["cache"]),
            scheduler=SchedulerConfig(**sections["scheduler"]),
            speculative=SpeculativeConfig(**sections["speculative"]),
            storage=StorageConfig(**sections["storage"]),
            transfer=TransferConfig(**sections["transfer"]),
            engine=EngineConfig(kind="fake", fake=FakeEngineConfig(**sections["engine"])),
            kv_events=KVEventsConfig(**self._overrides.get(name, {}).get("kv_events", {})),
            cluster=ClusterSettings(drain_timeout_s=20.0, self_check="fatal"),
        )

    def start(self, name: str, role: Role, port: int | None = None) -> NodeProcess:
        """Start a node, or start it again."""
        number = next(self._incarnations)
        config = self.config(name, role, port or 8000 + sum(name.encode()))
        node = self.nodes[name] = NodeProcess(self, config, f"{number:04x}")
        return node

    def kill(self, name: str) -> None:
        """SIGKILL a node. Its messager's lifeline is cut; everybody else only notices its silence."""
        self.nodes.pop(name).exit("killed")

    def restart(self, name: str, port: int | None = None) -> NodeProcess:
        """Kill a node and start it again at once, at the same address unless there is a new ``port``."""
        config = self.nodes[name].config
        self.kill(name)
        return self.start(name, config.role, port or config.port)

    def _start_router(self) -> RouterProcess:
        return RouterProcess(self, self.router_settings(f"{next(self._incarnations):04x}"))

    def router_settings(self, incarnation: str, first_epoch: int = 0) -> RouterSettings:
        """Return what a router of this World goes by."""
        options = {"first_epoch": first_epoch, "limits": self._limits, "self_check": "fatal", **self._router_options}
        return RouterSettings("demo", incarnation, **options)

    def restart_router(self) -> None:
        """SIGKILL the router, and with it all clients, and start it again."""
        self.router.exit("killed")
        self.clients.clear()
        self.router = self._start_router()

    def stop(self, name: str) -> None:
        """SIGTERM a node: it drains."""
        self.nodes[name].handle(StopRequested())

    def add(self, process: Process) -> None:
        """Let ``process`` be found, and give it what was sent to its addresses before it was there."""
        self.processes[process.peer] = process
        for address in process.addresses:
            for source, message in self._undelivered.pop(address, []):
                if source.alive and address in source.connections.values():
                    self.link.send(source.peer, process.peer, message, ())

    def keep(self, address: str, source: Process, message: Message) -> None:
        """Keep a message for whoever will listen at ``address``, as a connecting socket does."""
        self._undelivered.setdefault(address, []).append((source, message))

    def remove(self, process: Process) -> None:
        """Let ``process`` be found no more."""
        del self.processes[process.peer]
        self.dead.append(process)
        self.nodes = {name: node for name, node in self.nodes.items() if node is not process}

    def reach(self, source: Process, peer: PeerId) -> PeerId | None:
        """Return who gets what ``source`` sends to ``peer``, or None if nobody does."""
        if peer in source.connections:
            address = source.connections[peer]
            return next((name for name, process in self.processes.items() if address in process.addresses), None)
        real = next((real for real, alias in source.aliases.items() if alias == peer), peer)
        target = self.processes.get(real)
        if target is not None and any(address in source.addresses for address in target.connections.values()):
            return real
        return None

    def _arrive(self, parcel: Parcel, message: Message, payload: Payload) -> None:
        target = self.processes.get(parcel.target)
        source = self.processes.get(parcel.source) or next((p for p in self.dead if p.peer == parcel.source), None)
        if target is not None and source is not None:
            target.receive(source, message, payload)

    def check(self, process: Process) -> None:
        """Look for broken invariants after an event, if this World is careful."""
        if self.careful and isinstance(process, NodeProcess):
            process.machine.kv.check_invariants()
            require(process.machine.requests.laws(), "requests")

    # ------------------------------------------------------------ clients

    def submit(
        self, prompt: int | list[int], max_tokens: int = 8, *, priority: int = 0, session: str = "", **sampling: Any
    ) -> Client:
        """Ask for a completion of ``prompt``: token ids, or how many random ones."""
        token_ids = self.prompt(prompt) if isinstance(prompt, int) else prompt
        request_id = f"r{next(self._request_numbers)}"
        defaults = {"seed": self.rng.getrandbits(32), "temperature": 0.0, "eos_token_ids": [EOS]}
        params = SamplingParams(max_tokens=max_tokens, **{**defaults, **sampling})
        client = self.clients[request_id] = Client(
            request_id, token_ids, params, self.reference(token_ids, params), self.now
        )
        if params.num_prompt_logprobs is not None and len(token_ids) > 1:
            client.expected_prompt = self.reference_prompt(token_ids, params)
        new = NewRequest(RequestId(request_id), token_ids, params, priority, session)
        self.router.handle(Submitted((new,)))
        client.nodes = [peer_name(peer) for peer in self.router.machine.requests.nodes_of(RequestId(request_id))]
        return client

    def prompt(self, num_tokens: int) -> list[int]:
        """Return a random prompt."""
        return [self.rng.randrange(2, VOCAB_SIZE) for _ in range(num_tokens)]

    def reference(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """Return the output tokens of a clean run."""
        if not params.max_tokens:
            return []
        spec = RequestSpec(request_id=RequestId("reference"), epoch=0, prompt_token_ids=prompt, sampling=params)
        return reference_tokens(
            spec, FakeEngineConfig(**self._sections["engine"]), self._sections["cache"]["block_size"]
        )

    def reference_prompt(self, prompt: list[int], params: SamplingParams) -> PromptLogprobs:
        """Return the logprobs of a prompt that are computed all at once."""
        spec = RequestSpec(request_id=RequestId("reference"), epoch=0, prompt_token_ids=prompt, sampling=params)
        return reference_prompt_logprobs(
            spec, FakeEngineConfig(**self._sections["engine"]), self._sections["cache"]["block_size"]
        )

    def greedy_reference(self, prompt: list[int]) -> list[int]:
        """Return the output tokens ``submit`` would expect for a greedy request for 20."""
        return self.reference(prompt, SamplingParams(max_tokens=20, seed=0, temperature=0.0, eos_token_ids=[EOS]))

    def abort(self, client: Client) -> None:
        """The client leaves."""
        self.router.handle(ClientGone(RequestId(client.request_id)))

    def cancel(self, client: Client) -> None:
        """An operator cancels the request."""
        self.router.handle(CancelRequested(RequestId(client.request_id)))

    def reset_prefix_caches(self) -> CacheResetEnded:
        """An operator resets the prefix caches; return what the router says of it."""
        reset = self.rng.getrandbits(32)
        self.router.handle(CacheResetRequested(reset))
        self.run_until(lambda: any(ended.reset == reset for ended in self.cache_resets), 10.0)
        return self.cache_resets[-1]

    def pass_deadline(self, client: Client) -> None:
        """The time that the request may take is over."""
        self.router.handle(TimerFired(RequestTimer(RequestId(client.request_id), "deadline")))

    def deliver(self, action: Deliver) -> None:
        """Hand a delivery of the router to its client."""
        self.clients[action.request_id].take(action.delivery, self.now)

    def counted(self, name: str, letter: str) -> float:
        """Return the sum of a counter over the live nodes whose name begins with ``letter``."""
        loads = [node.machine.load() for key, node in self.nodes.items() if key.startswith(letter)]
        return sum(load.counters.get(name, 0.0) for load in loads)

    def all_ended(self) -> bool:
        """Return whether every client has its terminal delivery."""
        return all(client.ended is not None for client in self.clients.values())

    # ------------------------------------------------------------ the end

    def settle_clients(self, limit_s: float = 300.0) -> None:
        """Let every request come to its end."""
        self.run_until(self.all_ended, limit_s)
        for client in self.clients.values():
            client.check()

    def serve_all(self, limit_s: float = 300.0) -> None:
        """Let every request come to its end; none may end with an error."""
        self.settle_clients(limit_s)
        errors = {client.request_id: client.error for client in self.clients.values() if client.error is not None}
        assert not errors, self.told()

    def settle(self, limit_s: float = 300.0) -> None:
        """Let everything come to rest: every request ended, nothing held or owed, all blocks back."""
        self.settle_clients(limit_s)
        deadline = self.now + limit_s
        while (problem := self._restless()) is not None:
            if self.now > deadline:
                raise AssertionError(f"not at rest: {problem}\n{self.told()}") from problem
            self.run_for(0.5)

    def _restless(self) -> LocalProtocolError | None:
        try:
            for process in self.processes.values():
                process.machine.assert_quiescent()  # type: ignore[attr-defined]
        except LocalProtocolError as problem:
            return problem
        return None

    def told(self, count: int = 40) -> str:
        """Return the last events, for a failed test to show."""
        lines = [f"{at_s - 1000:10.4f} {peer:20} {event!r:.200}" for at_s, peer, event in self.history]
        return "\n".join(lines[-count:])

    def close(self) -> None:
        """Give all memory back."""
        for process in [*self.processes.values(), *self.dead]:
            if isinstance(process, MessagerProcess):
                process.close()
        for process in [*self.processes.values(), *self.dead]:
            if isinstance(process, NodeProcess):
                process.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            self.close()
