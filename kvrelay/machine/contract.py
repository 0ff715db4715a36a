"""The contract of a role: events in, actions out.

A role is a machine: ``handle(event, now)`` changes its state and returns what its surroundings must do. It never
awaits, reads a clock, touches a socket or draws a random number, so the same machine runs on sockets (``shell``), on a
fake network under test and on virtual time. Each action that starts work is answered by exactly one event.

Events and actions are Structs, which are made in a quarter of the time of frozen dataclasses: there are dozens for each
request.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.kv_events import KVEvent
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.messages.engine import StepPlan, StepResult

# ---------------------------------------------------------------- events


class Received(msgspec.Struct, frozen=True):
    """A decoded message came in. ``payload``: raw parts that followed it (KV frames only).

    ``encoded``: what ``message`` was decoded from, for the recording; empty if it came over no connection.
    """

    peer: PeerId
    message: Message
    payload: tuple[memoryview, ...] = ()
    encoded: bytes = b""


class PeerLost(msgspec.Struct, frozen=True):
    """``peer`` is disconnected: nothing more comes from it or reaches it. Also sent when its queue stayed full."""

    peer: PeerId
    reason: str


class LayersComputed(msgspec.Struct, frozen=True):
    """The KV of ``layers`` of a step is in the pool, but for sequences that the step's result says have failed."""

    step: int
    layers: range


class StepDone(msgspec.Struct, frozen=True):
    """Answers RunStep: the outcome of each sequence, errors of single sequences included."""

    result: StepResult


class StepFailed(msgspec.Struct, frozen=True):
    """Answers RunStep: no sequence of the step has an outcome. The KV of the tokens it was to compute is undefined.

    The engine may not know what the plan said of new and changed sequences; it has forgotten those that left.
    """

    step: int
    reason: str


class EngineLost(msgspec.Struct, frozen=True):
    """Answers RunStep: the engine's device is broken for good, and with it every step now and later."""

    reason: str


class TimerFired(msgspec.Struct, frozen=True):
    """Answers SetTimer."""

    key: Hashable


class Started(msgspec.Struct, frozen=True):
    """First event of every machine."""


class Resumed(msgspec.Struct, frozen=True):
    """This process did not run for ``paused_s`` seconds: it was stopped, or got no CPU.

    Comes before every other event handled since. What peers sent meanwhile is still unread, so their silence during
    that time means nothing. Timers that became due meanwhile fire after what is readable has been read.
    """

    paused_s: float


class StopRequested(msgspec.Struct, frozen=True):
    """The operator wants this process to end: take nothing new, finish or hand back what runs, then Exit."""


class KVStaged(msgspec.Struct, frozen=True):
    """Answers StageKV: nothing reads the blocks any more, and they are copied unless that broke."""

    key: Hashable
    copied: bool = True


class KVStored(msgspec.Struct, frozen=True):
    """Answers StoreKV: the first ``num_blocks`` blocks are in the store, ``num_written`` of all were not before."""

    key: Hashable
    num_blocks: int
    num_written: int


class KVLoaded(msgspec.Struct, frozen=True):
    """Answers LoadKV: the first ``num_blocks`` blocks hold their KV, verified; nothing writes to any of them now."""

    key: Hashable
    num_blocks: int


class StoreCounted(msgspec.Struct, frozen=True):
    """What the node's store has done so far, after each call. For people: nothing depends on it."""

    counters: dict[str, float]


class DumpWritten(msgspec.Struct, frozen=True):
    """Answers WriteDump: the recording of ``process`` is in the file ``path``, or ``error`` says why it is not."""

    router: PeerId
    dump_id: str
    process: str
    path: str
    error: str


CoreEvent: TypeAlias = (
    Received
    | PeerLost
    | LayersComputed
    | StepDone
    | StepFailed
    | EngineLost
    | TimerFired
    | Started
    | Resumed
    | StopRequested
    | KVStaged
    | KVStored
    | KVLoaded
    | StoreCounted
    | DumpWritten
)

# ---------------------------------------------------------------- actions


class Send(msgspec.Struct, frozen=True):
    """Send ``message``. If it cannot be queued at once, a PeerLost follows."""

    peer: PeerId
    message: Message


class Connect(msgspec.Struct, frozen=True):
    """Open a connection to the process that listens at ``address`` and call it ``peer``."""

    peer: PeerId
    address: str


class Disconnect(msgspec.Struct, frozen=True):
    """Forget ``peer``: drop what is queued for it and whatever it still sends."""

    peer: PeerId


class RunStep(msgspec.Struct, frozen=True):
    """Run one model step after those asked for before.

    StepDone, StepFailed or EngineLost follows, after LayersComputed events.
    """

    plan: StepPlan


class SetTimer(msgspec.Struct, frozen=True):
    """Fire ``key`` at time ``at_s``; setting it again moves it."""

    key: Hashable
    at_s: float


class CancelTimer(msgspec.Struct, frozen=True):
    """Forget the timer ``key``. Has no effect if there is none."""

    key: Hashable


class StageKV(msgspec.Struct, frozen=True):
    """Copy ``blocks`` of the pool to ``slots`` of the node's staging memory; KVStaged follows, within milliseconds."""

    key: Hashable
    blocks: Sequence[BlockId]
    slots: Sequence[int]


class StoreKV(msgspec.Struct, frozen=True):
    """Write ``slots`` of the staging memory to the store, as ``hashes``; KVStored follows, whatever the store does."""

    key: Hashable
    hashes: Sequence[bytes]
    slots: Sequence[int]


class LoadKV(msgspec.Struct, frozen=True):
    """Read the first of ``hashes`` that the store has into ``blocks`` of the pool; KVLoaded follows in ``timeout_s``.

    Fewer than ``min_blocks`` are not worth reading.
    """

    key: Hashable
    hashes: Sequence[bytes]
    blocks: Sequence[BlockId]
    min_blocks: int
    timeout_s: float


NodeState: TypeAlias = Literal["ready", "draining"]


class Announce(msgspec.Struct, frozen=True):
    """Publish this node and its ``state`` in the registry until the process ends. Not with a static registry."""

    state: NodeState


class Ready(msgspec.Struct, frozen=True):
    """Report to the supervisor that this process has started. May be repeated."""


LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]


class Log(msgspec.Struct, frozen=True):
    """Write a log line. For people: nothing depends on it."""

    level: LogLevel
    event: str
    fields: dict[str, object] = {}


class Exit(msgspec.Struct, frozen=True):
    """This process is done."""

    reason: str = ""


class PublishKVEvents(msgspec.Struct, frozen=True):
    """Publish what has changed in the prefix cache at ``at_s``. Not answered."""

    at_s: float
    events: list[KVEvent]


class WriteDump(msgspec.Struct, frozen=True):
    """Write the recording of this process to a file for ``router``, which calls it ``dump_id``; DumpWritten follows.

    Without ``with_prompts`` tokens are left out.
    """

    router: PeerId
    dump_id: str
    with_prompts: bool


CoreAction: TypeAlias = (
    Send
    | Connect
    | Disconnect
    | RunStep
    | SetTimer
    | CancelTimer
    | StageKV
    | StoreKV
    | LoadKV
    | Announce
    | PublishKVEvents
    | Ready
    | Log
    | WriteDump
    | Exit
)


class Machine(Protocol):
    """What a shell, a fake network or a simulator drives. Roles add their own events and actions to the core ones."""

    def handle(self, event: Any, now: float) -> Sequence[object]:
        """Take ``event`` at time ``now`` (seconds); return what must be done, in order.

        A machine takes a closed union of events, which its own ``handle`` names.
        """
