"""Faults injected on purpose: a transport that loses, delays, repeats and damages messages."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvrelay.protocol.ids import PeerId, peer_name
from kvrelay.protocol.messages.base import Message
from kvrelay.runtime.keys import Keys
from kvrelay.runtime.logging import log_event
from kvrelay.runtime.message_faults import MessageFaults
from kvrelay.runtime.transport import Transport

ANY_MESSAGE = "*"

_Delayed: TypeAlias = tuple[Message, tuple[memoryview, ...]]


def open_transport(
    me: PeerId,
    deliver: Callable[[object], None],
    faults: MessageFaults | None,
    *,
    send_queue: int = 1000,
    keys: Keys | None = None,
) -> Transport:
    """Return the transport of a process, with ``faults`` if there are any."""
    if faults is None:
        return Transport(me, deliver, send_queue=send_queue, keys=keys)
    log_event("error", "faults are injected on purpose", {"messages": faults.rates})
    return FaultyTransport(me, deliver, faults, send_queue=send_queue, keys=keys)


class FaultyTransport(Transport):
    """A transport whose messages suffer ``faults`` when they are sent, at random from its seed and ``me``'s name.

    Messages over private connections, between a node and its messager, suffer none.
    """

    def __init__(
        self,
        me: PeerId,
        deliver: Callable[[object], None],
        faults: MessageFaults,
        *,
        send_queue: int = 1000,
        keys: Keys | None = None,
    ) -> None:
        super().__init__(me, deliver, send_queue=send_queue, keys=keys)
        self._faults = faults
        self._rng = random.Random(f"{faults.seed} {peer_name(me)}")
        self._spared: set[PeerId] = set()
        self._later: set[asyncio.TimerHandle] = set()
        self._not_before_s: dict[PeerId, float] = {}
        """When the last delayed message of each peer is to be sent."""
        self._in_order: dict[PeerId, deque[_Delayed]] = {}
        """Messages that are sent late and not overtaken. Each has a timer, which sends the oldest of its peer: timers
        themselves keep no order on a loop that is late."""

    def bind_private(self, peer: PeerId, address: str) -> None:
        """See Transport. Messages of this connection are spared."""
        self._spared.add(peer)
        super().bind_private(peer, address)

    def connect_private(self, peer: PeerId, address: str) -> None:
        """See Transport. Messages of this connection are spared."""
        self._spared.add(peer)
        super().connect_private(peer, address)

    def send(self, peer: PeerId, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Send ``message`` with the faults that chance has for it."""
        if peer in self._spared:
            super().send(peer, message, payload)
            return
        kinds = self._chance(type(message).__name__)
        if "drop" in kinds:
            return
        if "corrupt" in kinds:
            payload = corrupted(payload)
        now = self._loop.time()
        delay_s = self._rng.random() * self._faults.max_delay_s
        at_s = max(now, self._not_before_s.get(peer, now))
        if "delay" in kinds and "overtake" not in kinds:
            at_s = self._not_before_s[peer] = max(at_s, now + delay_s)
        for _ in range(2 if "duplicate" in kinds else 1):
            if "overtake" in kinds:
                self._send_alone(now + delay_s, peer, _delayed(message, payload))
            elif at_s > now or peer in self._in_order:
                self._send_in_order(at_s, peer, _delayed(message, payload))
            else:
                super().send(peer, message, payload)

    def _chance(self, message: str) -> set[str]:
        rates = self._faults.rates.get(message)
        if rates is None:
            rates = self._faults.rates.get(ANY_MESSAGE, {})
        return {kind for kind, rate in rates.items() if self._rng.random() < rate}

    def _send_alone(self, at_s: float, peer: PeerId, delayed: _Delayed) -> None:
        self._at(at_s, lambda: super(FaultyTransport, self).send(peer, *delayed))

    def _send_in_order(self, at_s: float, peer: PeerId, delayed: _Delayed) -> None:
        queue = self._in_order.setdefault(peer, deque())
        queue.append(delayed)

        def send_oldest() -> None:
            oldest = queue.popleft()
            if not queue:
                del self._in_order[peer]
            super(FaultyTransport, self).send(peer, *oldest)

        self._at(at_s, send_oldest)

    def _at(self, at_s: float, send: Callable[[], None]) -> None:
        def fire() -> None:
            self._later.discard(handle)
            send()

        handle = self._loop.call_at(at_s, fire)
        self._later.add(handle)

    def disconnect(self, peer: PeerId) -> None:
        """See Transport."""
        self._not_before_s.pop(peer, None)
        super().disconnect(peer)

    def close(self) -> None:
        """See Transport. Delayed messages are lost."""
        for handle in self._later:
            handle.cancel()
        self._later.clear()
        super().close()


def _delayed(message: Message, payload: Sequence[memoryview]) -> _Delayed:
    """Return what is sent late. It must not read blocks that have been given to others meanwhile: copied."""
    return message, tuple(memoryview(bytes(part)) for part in payload)


def corrupted(payload: Sequence[memoryview]) -> tuple[memoryview, ...]:
    """Return ``payload`` with one bit of its last part changed, or nothing if there is none."""
    if not payload:
        return ()
    last = bytearray(payload[-1])
    last[len(last) // 2] ^= 0x10
    return (*payload[:-1], memoryview(bytes(last)))
