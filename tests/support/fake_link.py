"""A network that does what it is told: deliver in order after a while, or drop, delay, duplicate, reorder, corrupt."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from kvrelay.config.faults import FaultKind
from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.ids import PeerId, peer_name
from kvrelay.protocol.messages.base import Message
from kvrelay.runtime.faults import corrupted

Payload = tuple[memoryview, ...]

MAX_DELAY_S = 0.05
"""How late a message is at most that suffers a random delay."""


class Parcel(NamedTuple):
    """One message on its way. The payload is read when it arrives: until then it may still change under way."""

    source: PeerId
    target: PeerId
    data: bytes
    payload: Payload


@dataclass(slots=True)
class Fault:
    """What happens to messages of one type: to the ``nth`` (from 1), or to all. ``seconds``: how much later it comes.

    ``source`` and ``target`` are process names, to tell apart who sends it to whom.
    """

    kind: FaultKind
    message: str
    nth: int | None = None
    seconds: float = 0.0
    source: str | None = None
    target: str | None = None
    num_seen: int = 0

    def applies(self, parcel: Parcel, message: str) -> bool:
        """Count ``parcel`` and return whether it is one that is meant."""
        if message != self.message:
            return False
        if self.source not in (None, peer_name(parcel.source)) or self.target not in (None, peer_name(parcel.target)):
            return False
        self.num_seen += 1
        return self.nth in (None, self.num_seen)


@dataclass(slots=True)
class FakeLink:
    """Takes messages and hands them to ``arrive`` in due time.

    ``sent`` and ``arrived`` count messages by type, ``suffered`` faults by kind.
    """

    rng: random.Random
    schedule: Callable[[float, Callable[[], None]], None]
    clock: Callable[[], float]
    arrive: Callable[[Parcel, Message, Payload], None]
    latency_s: float = 0.0002
    jitter: float = 0.5
    rates: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    arrived: Counter[str] = field(default_factory=Counter)
    suffered: Counter[str] = field(default_factory=Counter)
    payload_bytes: int = 0
    _last_s: dict[tuple[PeerId, PeerId], float] = field(default_factory=dict)

    # ------------------------------------------------------------ what to do wrong

    def drop(self, message: str, nth: int | None = None, source: str | None = None, target: str | None = None) -> Fault:
        """Lose it."""
        return self._add(Fault("drop", message, nth, source=source, target=target))

    def delay(self, message: str, seconds: float, nth: int | None = None) -> Fault:
        """Deliver it later, and what follows it on the same connection after it."""
        return self._add(Fault("delay", message, nth, seconds))

    def overtake(self, message: str, seconds: float, nth: int | None = None) -> Fault:
        """Deliver it later; what follows it comes before it."""
        return self._add(Fault("overtake", message, nth, seconds))

    def duplicate(self, message: str, seconds: float = 0.0, nth: int | None = None) -> Fault:
        """Deliver it twice, the second time ``seconds`` later: a replay if that is long."""
        return self._add(Fault("duplicate", message, nth, seconds))

    def corrupt(self, message: str, nth: int | None = None) -> Fault:
        """Change a byte of its payload."""
        return self._add(Fault("corrupt", message, nth))

    def disturb(self, **rates: float) -> None:
        """Let each message between hosts suffer each fault with this probability.

        Messages between a node and its own messager, over a socket on one host, are spared.
        """
        self.rates = rates

    def heal(self) -> None:
        """Work properly from now on."""
        self.faults.clear()
        self.rates.clear()

    def _add(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    # ------------------------------------------------------------ doing it

    def send(self, source: PeerId, target: PeerId, message: Message, payload: Payload) -> None:
        """Put ``message`` on its way, as bytes."""
        name = type(message).__name__
        self.sent[name] += 1
        self.payload_bytes += sum(part.nbytes for part in payload)
        parcel = Parcel(source, target, encode(message), payload)
        faults = [fault for fault in self.faults if fault.applies(parcel, name)] + self._chance(parcel)
        self.suffered.update(fault.kind for fault in faults)
        kinds = {fault.kind: fault for fault in faults}
        if "drop" in kinds:
            return
        arrival_s = self.clock() + self.latency_s * (1 + self.jitter * self.rng.random())
        if "overtake" in kinds:
            self._deliver_at(arrival_s + kinds["overtake"].seconds, parcel, kinds)
            return
        if "delay" in kinds:
            arrival_s += kinds["delay"].seconds
        connection = (source, target)
        arrival_s = self._last_s[connection] = max(arrival_s, self._last_s.get(connection, 0.0))
        self._deliver_at(arrival_s, parcel, kinds)
        if "duplicate" in kinds:
            self._deliver_at(arrival_s + kinds["duplicate"].seconds, parcel, {})

    def _chance(self, parcel: Parcel) -> list[Fault]:
        ends = {peer_name(parcel.source), peer_name(parcel.target)}
        if any(f"{name}.messager" in ends for name in ends):
            return []
        return [
            Fault(cast(FaultKind, kind), "", seconds=self.rng.random() * MAX_DELAY_S)
            for kind, rate in self.rates.items()
            if self.rng.random() < rate
        ]

    def _deliver_at(self, at_s: float, parcel: Parcel, kinds: Mapping[FaultKind, Fault]) -> None:
        def arrived() -> None:
            payload = tuple(memoryview(bytes(part)) for part in parcel.payload)
            message = decode(parcel.data)
            self.arrive(parcel, message, corrupted(payload) if "corrupt" in kinds else payload)
            self.arrived[type(message).__name__] += 1

        self.schedule(at_s - self.clock(), arrived)
