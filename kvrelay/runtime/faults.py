"""Faults injected on purpose: a transport that loses, delays, repeats and damages messages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from kvrelay.protocol.ids import PeerId, peer_name
from kvrelay.protocol.messages.base import Message
from kvrelay.runtime.keys import Keys
from kvrelay.runtime.logging import log_event
from kvrelay.runtime.message_faults import MessageFaults
from kvrelay.runtime.transport import Transport

ANY_MESSAGE = "*"


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
        """Peers with a delayed message on its way, and when it is sent: others must not overtake it."""

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
        if "overtake" in kinds:
            at_s = now + delay_s
        elif "delay" in kinds:
            at_s = self._not_before_s[peer] = max(at_s, now + delay_s)
        self._send_at(at_s, peer, message, payload)
        if "duplicate" in kinds:
            self._send_at(at_s, peer, message, payload)

    def _chance(self, message: str) -> set[str]:
        rates = self._faults.rates.get(message)
        if rates is None:
            rates = self._faults.rates.get(ANY_MESSAGE, {})
        return {kind for kind, rate in rates.items() if self._rng.random() < rate}

    def _send_at(self, at_s: float, peer: PeerId, message: Message, payload: Sequence[memoryview]) -> None:
        if at_s <= self._loop.time():
            super().send(peer, message, payload)
            return
        # What is sent late must not read blocks that have been given to others meanwhile.
        copied = tuple(memoryview(bytes(part)) for part in payload)

        def send() -> None:
            self._later.discard(handle)
            super(FaultyTransport, self).send(peer, message, copied)

        handle = self._loop.call_at(at_s, send)
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


def corrupted(payload: Sequence[memoryview]) -> tuple[memoryview, ...]:
    """Return ``payload`` with one bit of its last part changed, or nothing if there is none."""
    if not payload:
        return ()
    last = bytearray(payload[-1])
    last[len(last) // 2] ^= 0x10
    return (*payload[:-1], memoryview(bytes(last)))
