"""KV from pool to pool while prompts are computed: by the cuda link and, for comparison, as payload through the host.

This process is both nodes: it computes prompts and owns both pools. Each node's messager is a process of its own and
opens the pools by their handles.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from cache_messager.settings import MessagerSettings
from gpu_check.context import Context
from gpu_check.driving import Driver, engine_of, sequence
from gpu_check.messager import Wire
from kvrelay.engine.compute_thread import compute_for
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.kv_pool.block_digest import digest_blocks, fold
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.machine.contract import LayersComputed, StepDone
from kvrelay.protocol.ids import BlockId, PeerId, RequestId
from kvrelay.protocol.messages.base import LinkAddress, Message
from kvrelay.protocol.messages.messager_to_node import (
    KVArrived,
    KVExpected,
    KVFailed,
    MessagerReady,
    TransferDone,
    TransferFailed,
)
from kvrelay.protocol.messages.node_to_messager import CachedSignal, ExpectKV, KVSpan, LayerSignal, OpenTransfer

PATIENCE_S = 60.0

LOADS = (("single", 5, 0.5), ("every 100 ms", 16, 0.1), ("16 at once", 16, 0.0))
"""What it is called, how many prompts, and how many seconds from the start of one to the start of the next."""


class Heard(NamedTuple):
    """A message of a messager, and when it came."""

    message: Message
    at_s: float


class Messagers:
    """The messagers of P and D, each in its process, and what they have told their nodes."""

    def __init__(self, source: DeviceMemory, target: DeviceMemory, kind: str) -> None:
        self._heard: list[Heard] = []
        self._changed = threading.Condition()
        self._processes: list[subprocess.Popen[str]] = []
        self._wires: dict[str, Wire] = {}
        peers = socket.socketpair()
        for (name, pool), peer in zip((("p0", source), ("d0", target)), peers, strict=True):
            mine, theirs = socket.socketpair()
            self._processes.append(_start(_settings(name, pool, kind), theirs, peer))
            theirs.close()
            peer.close()
            self._wires[name] = Wire(mine)
            threading.Thread(target=self._listen, args=(self._wires[name],), daemon=True).start()
        self._address: LinkAddress

    def begin(self) -> None:
        """Wait until both can be used."""
        self.wait(MessagerReady, lambda message: message.link.peer.startswith("p0"))
        ready: Any = self.wait(MessagerReady, lambda message: message.link.peer.startswith("d0")).message
        self._address = ready.link

    def _listen(self, wire: Wire) -> None:
        while (received := wire.receive()) is not None:
            with self._changed:
                self._heard.append(Heard(received[0], time.perf_counter()))
                self._changed.notify_all()

    def wait(self, kind: Any, suits: Any) -> Heard:
        """Return the first message of ``kind`` that ``suits``. Raises RuntimeError if none comes."""
        until = time.perf_counter() + PATIENCE_S
        with self._changed:
            while True:
                for heard in self._heard:
                    if isinstance(heard.message, kind) and suits(heard.message):
                        return heard
                codes = [process.poll() for process in self._processes]
                if time.perf_counter() > until or any(code is not None for code in codes):
                    raise RuntimeError(f"no {kind} came; the messagers' exit codes are {codes}, heard: {self._told()}")
                self._changed.wait(1.0)

    def _told(self) -> list[str]:
        others = [heard.message for heard in self._heard if type(heard.message).__name__ != "MessagerStats"]
        return [f"{message!r:.300}" for message in others[-5:]]

    def open(self, name: str, targets: list[BlockId]) -> None:
        """Have D expect a prompt's blocks and P send them as they come."""
        request: dict[str, Any] = {"request_id": name, "epoch": 1, "first_block": 0, "target_block_ids": targets}
        self._wires["d0"].send(ExpectKV(**request))
        self.wait(KVExpected, lambda message: message.request_id == name)
        self._wires["p0"].send(OpenTransfer(**request, link=self._address))

    def signal(self, name: str, layers: range, sources: list[BlockId]) -> None:
        """Tell P's messager that layers of a prompt are complete."""
        span = KVSpan(RequestId(name), 1, 0, sources)
        self._wires["p0"].send(LayerSignal(step=1, layer=layers.start, num_layers=len(layers), spans=[span]))

    def signal_all(self, name: str, sources: list[BlockId]) -> None:
        """Tell P's messager that a prompt is complete."""
        self._wires["p0"].send(CachedSignal(span=KVSpan(RequestId(name), 1, 0, sources)))

    def arrived_at(self, name: str) -> float:
        """Return when D's node was told that all of a prompt's KV is there. Raises RuntimeError if it is not."""
        heard = self.wait((KVArrived, KVFailed), lambda message: message.request_id == name)
        if isinstance(heard.message, KVFailed):
            raise RuntimeError(f"the transfer of {name} failed: {heard.message.error}")
        return heard.at_s

    def link_of(self, name: str) -> str:
        """Return the link that a prompt's blocks took."""
        done: Any = self.wait(TransferDone, lambda message: message.request_id == name).message
        return str(done.link)

    def close(self) -> None:
        """End both processes."""
        for wire in self._wires.values():
            wire.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _settings(name: str, pool: DeviceMemory, kind: str) -> MessagerSettings:
    return MessagerSettings(
        me=PeerId(f"{name}.messager#1"),
        node=PeerId(f"{name}#1"),
        node_address="",
        geometry=pool.geometry,
        pool=pool.handle,
        host="127.0.0.1",
        runtime_dir="",
        links=(kind,),
        peer_timeout_s=30.0,
    )


def _start(settings: MessagerSettings, node: socket.socket, peer: socket.socket) -> subprocess.Popen[str]:
    ends = (node.fileno(), peer.fileno())
    command = [sys.executable, "-W", "ignore", "-m", "gpu_check.messager", *map(str, ends)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=ends, text=True)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(settings).decode() + "\n")
    process.stdin.flush()
    return process


@contextlib.contextmanager
def _messagers(engine: DeviceEngine, target: DeviceMemory, kind: str) -> Iterator[Messagers]:
    assert isinstance(engine.memory, DeviceMemory)
    messagers = Messagers(engine.memory, target, kind)
    try:
        messagers.begin()
        yield messagers
    finally:
        messagers.close()


def run(context: Context) -> None:
    """Check the cuda link, then measure it and the way through the host."""
    length = 40 if context.tiny else 1024
    engine = engine_of(
        context, "llama3-8b", num_blocks=18 * -(-length // 16), max_num_seqs=2, tokens=length,
        max_model_len=2 * length, decode_graphs=(), digests=True,
    )  # fmt: skip
    assert isinstance(engine.memory, DeviceMemory)
    target = DeviceMemory.create(engine.geometry, engine.memory.num_blocks, engine.memory.handle.kind)
    try:
        _measure_kernel(context, engine.memory, target)
        _check_staging(context, target)
        for kind in ("cuda", "ipc"):
            began = time.perf_counter()
            with _messagers(engine, target, kind) as messagers:
                context.report.add("link", f"{kind} link, start of both messagers", time.perf_counter() - began, "s")
                _check(context, engine, target, messagers, kind, length)
                for load in LOADS:
                    _measure(context, engine, messagers, kind, length, load)
    finally:
        engine.close()
        target.close()


def _measure_kernel(context: Context, source: DeviceMemory, target: DeviceMemory) -> None:
    """Measure copies of scattered blocks with digests, and digests alone, as the link and the engine do them."""
    geometry = source.geometry
    num_planes, count = 2 * min(4, geometry.num_layers), min(64, source.num_blocks)
    rng = np.random.default_rng(0)
    sources, targets = (rng.permutation(source.num_blocks)[:count].tolist() for _ in range(2))
    num_bytes = num_planes * count * geometry.plane_block_bytes
    for what, times, into in (("copied and digested", 2, target), ("digested", 1, None)):
        seconds = context.seconds_in_graph([_moving(source, into, range(num_planes), sources, targets)] * 10)
        limit = times * num_bytes / context.copy_bytes_per_s * 1e6
        name = f"{num_planes // 2} layers of {count} scattered blocks, {num_bytes / 1e6:.1f} MB, {what}"
        context.report.add("link", name, seconds * 1e6, "us", limit, f"{num_bytes / seconds / 1e9:.0f} GB/s")


def _moving(
    source: DeviceMemory, target: DeviceMemory | None, planes: range, sources: list[BlockId], targets: list[BlockId]
) -> Callable[[], object]:
    """Return one launch of the kernel, or on a CPU what stands for it."""
    if source.handle.kind == "simulated":
        if target is None:
            return lambda: source.blocks.begin_digest(planes, sources)
        return lambda: target.blocks.begin_copy(source.blocks, planes, targets, sources)
    from kvrelay.kv_pool.copy_kernel import move_blocks  # noqa: PLC0415

    ids = source.blocks._pinned_ids([sources, targets])
    digests = torch.empty((len(planes), len(sources)), dtype=torch.int64, pin_memory=True)
    reads = source.blocks._place(planes, ids[0])
    writes = None if target is None else target.blocks._place(planes, ids[1])
    num_words = source.geometry.plane_block_bytes // 8

    def launch(kept: tuple[Any, torch.Tensor] = (ids, digests)) -> None:
        move_blocks(reads, writes, kept[1].data_ptr(), len(planes), len(sources), num_words)

    return launch


def _check_staging(context: Context, memory: DeviceMemory) -> None:
    """Check that whole blocks, as a store takes and gives them, go to the device and come back."""
    geometry, ids = memory.geometry, [BlockId(5), BlockId(0), BlockId(2)]
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 255, (len(ids), geometry.num_layers, 2, geometry.plane_block_bytes), np.uint8)
    with memory.lend(ids) as lent:
        for mine, block in zip(lent, blocks, strict=True):
            mine[:] = block
    back = np.empty_like(blocks)
    memory.copy_out(ids, list(back))
    assert np.array_equal(back, blocks), "blocks changed on their way to the device and back"
    noted = memory.digest(range(geometry.num_layers), ids)
    assert memory.begin_digest(range(geometry.num_layers), ids).wait() == noted, "the device digests otherwise"
    context.report.add("link", "blocks of a store, to the device and back", "equal, and so are their digests")


def _check(
    context: Context, engine: DeviceEngine, target: DeviceMemory, messagers: Messagers, kind: str, length: int
) -> None:
    """Check that a prompt's blocks arrive as they are, and that a damaged one does not."""
    memory, every = engine.memory, range(engine.geometry.num_layers)
    assert isinstance(memory, DeviceMemory)
    driver = Driver(engine)
    first = _compute(engine, driver, messagers, f"{kind} check", length)
    messagers.arrived_at(f"{kind} check")
    assert messagers.link_of(f"{kind} check") == kind
    targets = _targets(memory, first.table)
    sent, arrived = (_words(pool, ids) for pool, ids in ((memory, first.table), (target, targets)))
    assert np.array_equal(sent, arrived), "blocks differ from those that were sent"
    assert sent.any(-1).all(), "a block was never written"
    digest = fold(digest_blocks(sent))
    assert memory.digest(every, first.table) == digest == target.digest(every, targets), "digests are wrong"
    context.report.add("link", f"{kind} link, {length} tokens in {len(targets)} scattered blocks", "equal")
    if kind == "cuda":
        _check_damage(context, memory, messagers, first.table)
    driver.give_back([first.sequence])


def _check_damage(context: Context, memory: DeviceMemory, messagers: Messagers, table: list[BlockId]) -> None:
    """Change one bit of one block after it was digested: it must be refused, and arrive once it is right again."""
    planes, block = range(3, 4), table[1]
    right = memory.blocks.read(planes, [block])
    wrong = right.copy()
    wrong[0, 0, -1] ^= 1
    targets = _targets(memory, table)
    for name, words in (("damaged", wrong), ("repaired", right)):
        memory.blocks.write(planes, [block], words)
        messagers.open(name, targets)
        messagers.signal_all(name, table)
        if name == "repaired":
            messagers.arrived_at(name)
            continue
        for kind in (KVFailed, TransferFailed):
            failed: Any = messagers.wait(kind, lambda message: message.request_id == "damaged").message
            assert failed.error.code == "corrupt_kv", failed
    context.report.add("link", "cuda link, a block with one wrong bit", "refused, and taken when it was right again")


class Computed(NamedTuple):
    """A prompt that was computed: its sequence, its blocks on P, and when its first token was there."""

    sequence: Any
    table: list[BlockId]
    at_s: float


def _compute(engine: DeviceEngine, driver: Driver, messagers: Messagers, name: str, length: int) -> Computed:
    """Compute a prompt with a node's compute threads while its KV travels."""
    tokens = np.random.default_rng(len(name)).integers(0, engine.vocab_size, length).tolist()
    one = sequence(tokens, name)
    plan = driver.plan([(one, length)])
    table = list(one.block_table)
    messagers.open(name, _targets(engine.memory, table))
    events: SimpleQueue[Any] = SimpleQueue()
    compute = compute_for(engine, events.put, layer_events=True)
    compute.start()
    compute.submit(plan)
    while isinstance(event := events.get(), LayersComputed):
        messagers.signal(name, event.layers, table)
    at_s = time.perf_counter()
    compute.stop()
    if not isinstance(event, StepDone):
        raise RuntimeError(f"the prompt was not computed: {event}")
    driver.finish(event.result.sampled)
    return Computed(one, table, at_s)


def _targets(memory: Any, table: list[BlockId]) -> list[BlockId]:
    """Return D's blocks for those of P: others, in another order."""
    return [memory.num_blocks - 1 - block for block in table]


def _words(memory: DeviceMemory, block_ids: list[BlockId]) -> Any:
    return memory.blocks.read(range(2 * memory.geometry.num_layers), block_ids)


def _measure(
    context: Context, engine: DeviceEngine, messagers: Messagers, kind: str, length: int, load: tuple[str, int, float]
) -> None:
    """Measure how long after its first token the last of a prompt's KV is on D."""
    what, count, gap_s = load
    driver, began = Driver(engine), time.perf_counter()
    computed: dict[str, Computed] = {}
    for index in range(2 if context.tiny else count):
        time.sleep(max(0.0, began + index * gap_s - time.perf_counter()))
        name = f"{kind}, {what}, {index}"
        computed[name] = _compute(engine, driver, messagers, name, length)
    exposed = [max(0.0, messagers.arrived_at(name) - one.at_s) * 1e3 for name, one in computed.items()]
    seconds = max(messagers.arrived_at(name) for name in computed) - began
    driver.give_back([one.sequence for one in computed.values()])
    num_bytes = len(computed) * len(next(iter(computed.values())).table) * engine.geometry.block_bytes
    context.report.add(
        "link", f"{kind} link, {what}: KV of {length} tokens exposed after the first token, median",
        statistics.median(exposed), "ms", None,
        f"worst {max(exposed):.1f} ms; {len(exposed)} prompts, {num_bytes / 1e6:.0f} MB in {seconds * 1e3:.0f} ms",
    )  # fmt: skip
